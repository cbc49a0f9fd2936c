"""Options of tokenizers, so that misspelt ones are refused."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from tokenizers import AddedToken

from quintet.errors import InputError, shown

Side = Literal["left", "right"]

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TokenizerOptions(TypedDict, total=False):
    """The options of a new tokenizer; `tokenizer_config.json` has the same keys."""

    bos_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    unk_token: str | AddedToken | None
    sep_token: str | AddedToken | None
    pad_token: str | AddedToken | None
    cls_token: str | AddedToken | None
    mask_token: str | AddedToken | None
    additional_special_tokens: Sequence[str | AddedToken] | None
    extra_special_tokens: Sequence[str | AddedToken] | Mapping[str, str] | None
    padding_side: Side
    truncation_side: Side
    model_max_length: int | None
    model_input_names: Sequence[str]
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    do_lower_case: bool | None
    pad_token_type_id: int | None
    errors: str
    chat_template: str | Mapping[str, str] | None
    name_or_path: str


class EncodeOptions(TypedDict, total=False):
    """The options of `tokenizer(...)`."""

    add_special_tokens: bool
    padding: bool | str
    truncation: bool | str | None
    max_length: int | None
    stride: int
    is_split_into_words: bool
    pad_to_multiple_of: int | None
    padding_side: Side | None
    return_tensors: str | None
    return_token_type_ids: bool | None
    return_attention_mask: bool | None
    return_overflowing_tokens: bool
    return_special_tokens_mask: bool
    return_offsets_mapping: bool
    return_length: bool
    split_special_tokens: bool | None
    verbose: bool


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown names.

    Raises:
        InputError: there is one; the message names the nearest known name.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise InputError(f"{owner} does not know {name!r}; {hint}")


def check_values(given: Mapping[str, Any], error: Callable[[str], Exception]) -> None:
    """Refuse options of a wrong type.

    Raises:
        Exception: what `error` makes of the message, which names the option and the value.
    """
    for name, value in given.items():
        usable, expected = _KINDS.get(name, (lambda _: True, ""))
        if not usable(value):
            raise error(f"{name}={shown(value)} has to be {expected}")


# What a pipeline decides, though other tokenizers have an option for it: a file that names one is
# not obeyed, and a caller may only ask for what is so.
FIXED: Mapping[str, tuple[Any, str]] = {
    "do_lower_case": (
        False,
        "the pipeline says what is done to letters; for small ones put "
        "tokenizers.normalizers.Lowercase() into backend_tokenizer.normalizer",
    ),
    "pad_token_type_id": (0, "padding is of the segment 0"),
}


def check_fixed(given: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect.

    Raises:
        InputError: one has another value than the one that holds anyway.
    """
    for name, (value, why) in FIXED.items():
        if given.get(name) is not None and given[name] != value:
            raise InputError(f"{name}={shown(given[name])} has no effect here: {why}")


def is_text(value: Any) -> bool:
    """Return whether a value is Unicode text without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_token(value: Any) -> bool:
    if isinstance(value, AddedToken):
        return True
    return is_text(value.get("content") if isinstance(value, Mapping) else value)


def _are_tokens(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, Mapping):
        return all(map(_is_token, value.values()))
    return isinstance(value, list | tuple) and all(map(_is_token, value))


def _is_limit(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(is_text, value))


_Kind = tuple[Callable[[Any], bool], str]
_TOKEN: _Kind = (lambda value: value is None or _is_token(value), "a token, its text, or null")
_TOKENS: _Kind = (_are_tokens, "a list of tokens, or tokens by name")
_SWITCH: _Kind = (_is_switch, "true or false")
_TEXT: _Kind = (is_text, "a text")
_SIDE: _Kind = (lambda value: value in ("left", "right"), "one of 'left', 'right'")
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(NAMED_TOKENS, _TOKEN),
    **dict.fromkeys(["additional_special_tokens", "extra_special_tokens"], _TOKENS),
    **dict.fromkeys(["clean_up_tokenization_spaces", "split_special_tokens"], _SWITCH),
    **dict.fromkeys(["add_bos_token", "add_eos_token", "add_prefix_space"], _SWITCH),
    **dict.fromkeys(["padding_side", "truncation_side"], _SIDE),
    "errors": _TEXT,
    "model_max_length": (_is_limit, "a number from 0"),
    "model_input_names": (_are_names, "a list of names"),
}


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        InputError: it is none of them.
    """
    if value not in choices:
        raise InputError(f"{name}={shown(value)} has to be one of {', '.join(map(repr, choices))}")
