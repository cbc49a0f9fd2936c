"""Whether a text is read as if a space were before it."""

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from quintet.errors import InputError


def set_prefix_space(backend: Tokenizer, wanted: bool | None) -> None:
    """Switch the space in front on or off, in a pipeline's own byte-level step.

    Raises:
        InputError: the pipeline has no such step, so its file alone says how a text begins.
    """
    if wanted is None:
        return
    steps = list(_byte_level(backend.pre_tokenizer))
    if not steps:
        raise InputError(
            f"add_prefix_space={wanted} is for pipelines with a byte-level step, and this one "
            "has none: its tokenizer.json says how a text begins; leave the option out"
        )
    for step in steps:
        step.add_prefix_space = wanted


def _byte_level(step: Any) -> Iterator[Any]:
    if isinstance(step, pre_tokenizers.ByteLevel):
        yield step
    elif isinstance(step, pre_tokenizers.Sequence):
        # Its parts are to be had by number alone.
        for part in iter(step):
            yield from _byte_level(part)
