"""Models to offer when none is named."""

import difflib
import sys
from collections.abc import Sequence

import click

from quintet.cli.local_models import LocalModel, in_cache, in_other_programs
from quintet.cli.output import size_of
from quintet.errors import InputError

SMALL = "smollm2"
FETCHED = f"{SMALL} (93 MB, fetched once)"
OTHERS = "a folder, a GGUF file, ollama:NAME, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"


def choose_model(cache_dir: str | None) -> str:
    """Ask which model to talk with, of those on this machine and one that is small.

    Raises:
        InputError: nobody is there to ask; the message lists them.
    """
    from quintet.auto import FAMILIES

    found = [*in_cache(cache_dir), *in_other_programs()]
    found = [model for model in found if model.talks and model.family in FAMILIES]
    names = [model.model for model in found]
    lines = _lines(found)
    if SMALL not in names:
        names.append(SMALL)
        lines.append(f"  {len(names)}  {FETCHED}")
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("\n".join([f"which model? quintet chat MODEL: {OTHERS}; or", *lines]))
    click.echo("\n".join(["Which model? Here are", *lines]), err=True)
    click.echo(f"Another: quintet chat MODEL, {OTHERS}", err=True)
    number = click.prompt("Number", type=click.IntRange(1, len(names)), default=1, err=True)
    return names[number - 1]


def meant(name: str) -> str | None:
    """Return the name of a model here, or of the small one, that a name is near to."""
    from quintet.sources import ollama_names

    full = {SMALL: SMALL}
    for known in ollama_names():
        short = known.removeprefix("ollama:")
        full |= {known: known, short: known, short.partition(":")[0]: known}
    near = difflib.get_close_matches(name, full, n=1, cutoff=0.75)
    return full[near[0]] if near else None


def _lines(found: Sequence[LocalModel]) -> list[str]:
    longest = max((len(model.model) for model in found), default=0)
    return [
        f"  {number}  {model.model:{longest}}  {size_of(model.size)}"
        for number, model in enumerate(found, 1)
    ]
