"""The keywords tokenizers take, in one place, so that a misspelt one is refused by name."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from tokenizers import AddedToken

from quintet.errors import InputError

__all__ = [
    "NAMED_TOKENS",
    "EncodeOptions",
    "Side",
    "TokenizerOptions",
    "check_choice",
    "check_names",
]

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
    """What a tokenizer can be told when it is made; `tokenizer_config.json` has the same keys."""

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
    errors: str
    chat_template: str | Mapping[str, str] | None
    name_or_path: str


class EncodeOptions(TypedDict, total=False):
    """What `tokenizer(...)` can be told, beside the text."""

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


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        InputError: there is one; the message names the nearest known name.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise InputError(f"{owner} does not know {name!r}; {hint}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        InputError: it is none of them.
    """
    if value not in choices:
        raise InputError(f"{name}={value!r} has to be one of {', '.join(map(repr, choices))}")
