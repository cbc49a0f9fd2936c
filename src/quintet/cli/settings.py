"""Options of `generate()` as words: `temperature=0.2`, and back."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from quintet.errors import InputError, QuintetError

if TYPE_CHECKING:
    from quintet.generation.config import GenerationConfig

LARGEST_SEED = 2**32 - 1
# What options count fits 32 bits.
_MOST = 2**31 - 1
COUNT, COUNT_OR_NONE = click.IntRange(1, _MOST), click.IntRange(0, _MOST)
THREADS = click.IntRange(1, 4096)

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
    """Return options of generate() in which a temperature turns sampling on or off.

    0 takes the likeliest token. Any other one, or another option of sampling, asks for a draw.

    Raises:
        InputError: a temperature below 0, or one of 0 beside a draw.
    """
    given = dict(options)
    heat = given.get("temperature")
    if isinstance(heat, int | float) and heat < 0:
        raise InputError(
            f"temperature={heat} has to be 0, which takes the likeliest token, or more"
        )
    if heat == 0:
        if given.get("do_sample"):
            raise InputError("temperature=0 takes the likeliest token, do_sample=True draws one")
        return {**given, "temperature": None, "do_sample": False}
    if any(given.get(name) is not None for name in SAMPLING):
        given.setdefault("do_sample", True)
    return given


def seed_of(value: Any) -> int | None:
    """Return a seed that was typed, or None for none.

    Raises:
        InputError: it is no seed.
    """
    if value is None or (type(value) is int and 0 <= value <= LARGEST_SEED):
        return value
    raise InputError(f"seed={value!r} has to be a whole number from 0 to {LARGEST_SEED}")


def applied(config: "GenerationConfig", options: Mapping[str, Any]) -> "GenerationConfig":
    """Return a config with typed options; None leaves one unchanged.

    Raises:
        InputError: there is no such option, or its value breaks a rule.
    """
    names = [option.name for option in fields(config) if option.name not in ("other", "read_as")]
    for name, value in options.items():
        if name not in names:
            raise InputError(f"there is no option {name!r}; {_instead(name, value, names)}")
    try:
        return config.replace(**options)
    except QuintetError as error:
        # Whoever types knows neither our classes nor JSON.
        text = str(error).removeprefix(f"{type(config).__name__}: ").removesuffix(" or null")
        raise InputError(text) from error


def _instead(name: str, value: Any, names: list[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
        return f"did you mean {near[0]!r}?"
    context = click.get_current_context(silent=True)
    flag = f"--{name.replace('_', '-')}"
    if context and any(flag in option.opts for option in context.command.params):
        return f"it is set where the command starts: {flag} {value}"
    return f"there are {', '.join(SHOWN)}, and those of docs/guides/generation.md"


def describe(config: "GenerationConfig", seed: int | None = None) -> str:
    """Describe the sampling in a line."""
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
    except (ValueError, RecursionError):
        return text
