"""Encodes conversations so that their text never becomes a control token.

No marker is put into the text. Every character of the conversation that could be part of a
control token is replaced by a character of its own that occurs nowhere, and the template is run
a second time. Where that gives the same text but for the replaced characters, each control token
found in it is the template's; the rest is encoded as text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken

from quintet.errors import ChatTemplateError, InputError, shown
from quintet.tokenization.encoding import Encoder
from quintet.tokenization.options import EncodeOptions
from quintet.tokenization.rendered import Rendered
from quintet.tokenization.rows import TokenizedRow
from quintet.tokenization.vocabulary import share_pipeline

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# Words that templates compare with, and that a caller chooses from.
_KNOWN = {
    "role": {"system", "user", "assistant", "tool", "developer", "function", "ipython"},
    "type": {
        *("text", "image", "image_url", "audio", "video", "function"),
        *("object", "array", "string", "number", "integer", "boolean", "null"),
    },
}
_KEY = re.compile(r"[A-Za-z0-9_.$-]*")


def sanitised_row(
    tokenizer: Encoder,
    render: Callable[[Mapping[str, Any]], Rendered],
    variables: Mapping[str, Any],
    text: str,
    options: EncodeOptions,
) -> TokenizedRow:
    """Encode a rendered conversation with only the template's control tokens.

    Raises:
        ChatTemplateError: the template rewrites what it is given, so that it cannot be told
            which part of the text is whose.
        InputError: the options ask for special tokens the template does not write.
    """
    if options.get("add_special_tokens") or options.get("split_special_tokens"):
        raise InputError(
            "sanitize_control_tokens=True leaves exactly the template's control tokens; it does "
            "not go with add_special_tokens or split_special_tokens"
        )
    added = tokenizer.added_tokens_decoder
    control = {index: token for index, token in added.items() if token.content.strip()}
    shared = {name: variables[name] for name in ("messages", "tools", "documents")}
    unused = _unused_characters({*text, *(c for one in _strings(shared) for c in one)})
    shadows = _shadows(tokenizer, control, shared, unused)
    table = str.maketrans(shadows)
    shadowed = render({**variables, **_translated(shared, table)}).text
    back = str.maketrans({shadow: letter for letter, shadow in shadows.items()})
    if shadowed.translate(back) != text:
        raise ChatTemplateError(
            "sanitize_control_tokens does not work for this conversation: the chat template "
            "rewrites or looks into its text, so it is not certain which control tokens are the "
            "template's; remove them from the messages beforehand"
        )
    spans = _control_spans(tokenizer, shadowed, set(control))
    return _encode_between(tokenizer, text, spans, added, unused)


def _control_spans(tokenizer: Encoder, text: str, control: set[int]) -> list[tuple[int, int, int]]:
    [encoding] = tokenizer._encode([text], add_special_tokens=False, split_special_tokens=False)
    return [
        (start, end, index)
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if index in control and end > start
    ]


def _encode_between(
    tokenizer: Encoder,
    text: str,
    spans: list[tuple[int, int, int]],
    added: Mapping[int, AddedToken],
    unused: Iterator[str],
) -> TokenizedRow:
    """Encode text in which only the given spans are control tokens.

    A second pipeline knows each control token by one character that is not in the text, and by
    nothing else; added tokens of spaces are text and stay what they are.
    """
    twin = share_pipeline(tokenizer.backend_tokenizer, added_tokens=False)
    blanks = {index: token for index, token in added.items() if not token.content.strip()}
    names = {index: next(unused) for index in sorted({index for _, _, index in spans})}
    aliases = [AddedToken(name, normalized=False, special=True) for name in names.values()]
    twin.add_tokens([*blanks.values(), *aliases])
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    reached = written = 0
    for start, end, index in spans:
        pieces += [text[reached:start], names[index]]
        written += start - reached
        places += [(written, start), (written + 1, end)]
        written, reached = written + 1, end
    [encoding] = twin.encode_batch(["".join([*pieces, text[reached:]])], add_special_tokens=False)
    renamed = {
        place: (index, added[index].content)
        for index, spelt in [*names.items(), *((i, t.content) for i, t in blanks.items())]
        if (place := twin.token_to_id(spelt)) is not None
    }
    for index in encoding.ids:
        if index not in renamed and index in added and index not in blanks:
            raise ChatTemplateError(
                f"sanitize_control_tokens does not work with this tokenizer: its vocabulary "
                f"spells {shown(added[index].content)} as ordinary text"
            )
    return TokenizedRow(encoding, renamed=renamed, places=places)


def _shadows(
    tokenizer: Encoder,
    control: Mapping[int, AddedToken],
    shared: Mapping[str, Any],
    unused: Iterator[str],
) -> dict[str, str]:
    """Return a substitute for each character of a control token."""
    alphabet = {letter for token in control.values() for letter in token.content}
    letters = sorted({letter for text in _strings(shared) for letter in text})
    normalizer = tokenizer.backend_tokenizer.normalizer
    shadows = {}
    for letter in letters:
        # Added tokens can be looked for in normalised text, where full-width forms are plain.
        forms = letter if normalizer is None else letter + normalizer.normalize_str(letter)
        if alphabet.intersection(forms):
            shadows[letter] = next(unused)
    return shadows


def _unused_characters(used: set[str]) -> Iterator[str]:
    return (chr(code) for area in _PRIVATE for code in area if chr(code) not in used)


def _strings(value: Any, key: str = "") -> Iterator[str]:
    """Walk over a caller's text, checking names that cannot be substituted."""
    if isinstance(value, str):
        if value not in _KNOWN.get(key, ()):
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if not _KEY.fullmatch(name):
                raise ChatTemplateError(
                    f"sanitize_control_tokens does not work with the key {name!r}; keys are "
                    "letters, digits, and _ . $ -"
                )
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _translated(value: Any, table: dict[int, str], key: str = "") -> Any:
    if isinstance(value, str):
        return value if value in _KNOWN.get(key, ()) else value.translate(table)
    if isinstance(value, dict):
        return {name: _translated(item, table, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_translated(item, table, key) for item in value]
    return value
