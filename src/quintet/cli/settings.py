"""Options of `generate()` as words: `temperature=0.2`, and back."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quintet.errors import InputError

if TYPE_CHECKING:
    from quintet.generation.config import GenerationConfig

__all__ = ["describe", "parse"]

# How an answer is drawn, and how it ends; ids and the like are of no interest to who reads.
SHOWN = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "use_mtp",
    "prompt_lookup_num_tokens",
    "num_assistant_tokens",
    "max_new_tokens",
    "max_length",
    "stop_strings",
)


def parse(words: Iterable[str]) -> dict[str, Any]:
    """Return options from words `name=value`; a value is JSON, or a text as it is.

    Raises:
        InputError: a word has no "=".
    """
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"{word!r} sets nothing; write name=value, such as temperature=0.7")
        options[name.strip().replace("-", "_")] = _value(value.strip())
    return options


def describe(config: "GenerationConfig", seed: int | None = None) -> str:
    """Say in a line how tokens are chosen."""
    given = {name: getattr(config, name) for name in SHOWN}
    sampled = bool(given.pop("do_sample"))
    if not sampled:
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
            given.pop(name)
    how = "sampling" if sampled else "greedy"
    if sampled and seed is not None:
        how += f" with seed {seed}"
    rest = [f"{name}={value}" for name, value in given.items() if value is not None]
    return f"{how}, {', '.join(rest)}" if rest else how


def _value(text: str) -> Any:
    # As one writes it in Python, or in JSON.
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return json.loads(text)
    except ValueError:
        return text
