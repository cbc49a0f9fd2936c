"""Validates inputs: one text or many, alone or in pairs, as strings or words."""

from collections.abc import Sequence
from typing import Any

from quintet.errors import InputError

Text = str | Sequence[str] | Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]]


def batch_of(text: Any, pair: Any, as_words: bool) -> tuple[list[Any], bool]:
    """Return texts and pairs as a batch, and whether they were one.

    Raises:
        InputError: something is not text, or the counts differ.
    """
    if as_words:
        batched = isinstance(text, list | tuple) and bool(text) and not isinstance(text[0], str)
    else:
        batched = isinstance(text, list | tuple)
    texts = list(text) if batched else [text]
    if pair is None:
        if not batched:
            return [_checked(text, as_words, "text")], False
        return [_alone_or_pair(one, as_words, f"text[{i}]") for i, one in enumerate(texts)], True
    if batched and not isinstance(pair, list | tuple):
        raise InputError(f"text is a list of {len(texts)}, so text_pair has to be one too")
    pairs = list(pair) if batched else [pair]
    if len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(pairs)} pairs")
    for index, text_and_pair in enumerate(zip(texts, pairs, strict=True)):
        place = f"[{index}]" if batched else ""
        for name, one in zip(("text", "text_pair"), text_and_pair, strict=True):
            _checked(one, as_words, f"{name}{place}")
    return list(zip(texts, pairs, strict=True)), batched


def _alone_or_pair(value: Any, as_words: bool, name: str) -> Any:
    """Return a text, or a pair."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return _checked(value, as_words, name)
    # Two strings are two words, where texts are lists of words.
    if as_words and any(isinstance(one, str) for one in value):
        return _checked(value, as_words, name)
    return tuple(_checked(one, as_words, f"{name}[{i}]") for i, one in enumerate(value))


def _checked(value: Any, as_words: bool, name: str) -> Any:
    if as_words:
        if not isinstance(value, list | tuple) or not all(isinstance(w, str) for w in value):
            raise InputError(
                f"{name} has to be a list of words, as is_split_into_words=True says, "
                f"not {type(value).__name__}"
            )
    elif not isinstance(value, str):
        found = f"not {type(value).__name__}"
        if isinstance(value, list | tuple):
            found += f" of {len(value)}; a pair has two, and is_split_into_words=True is for words"
        raise InputError(f"{name} has to be a string, {found}")
    return value
