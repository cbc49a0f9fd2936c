"""Options of `generate()` as words: `temperature=0.2`, and back."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quintet.errors import InputError

if TYPE_CHECKING:
    from quintet.generation.config import GenerationConfig

__all__ = ["SETTING", "describe", "drawn", "parse"]

# What a word that sets an option looks like; a question may have a "=" further on.
SETTING = re.compile(r"[A-Za-z_][\w-]*=")

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


# Options that mean nothing without a draw.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


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


def drawn(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of generate() in which a temperature says whether an answer is drawn.

    0 takes the likeliest token. Any other one, or another option of sampling, asks for a draw.
    """
    given = dict(options)
    if given.get("temperature") == 0:
        return {**given, "temperature": None, "do_sample": False}
    if any(given.get(name) is not None for name in SAMPLING):
        given.setdefault("do_sample", True)
    return given


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
