"""What there is to talk with, for who names no model."""

import sys
from collections.abc import Sequence

import click

from quintet.cli.here import Here, in_cache
from quintet.cli.output import size_of
from quintet.errors import InputError

__all__ = ["choose_model"]

NAME = (
    "quintet chat smollm2 (93 MB, fetched once), or quintet chat MODEL, where MODEL is a folder, a "
    "GGUF file, ollama:NAME, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
)


def choose_model(cache_dir: str | None) -> str:
    """Ask which model to talk with, of those on this machine.

    Raises:
        InputError: there is none, or nobody to ask; the message lists them.
    """
    from quintet.auto import FAMILIES

    found = [here for here in in_cache(cache_dir) if here.talks and here.family in FAMILIES]
    if not found:
        raise InputError(f"which model? {NAME} (1 GB, fetched once)")
    lines = _lines(found)
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("\n".join(["which model? quintet chat MODEL; here are", *lines]))
    click.echo(
        "\n".join(["Models on this machine (another: quintet chat MODEL)", *lines]), err=True
    )
    number = click.prompt("Which", type=click.IntRange(1, len(found)), default=1, err=True)
    return found[number - 1].model


def _lines(found: Sequence[Here]) -> list[str]:
    longest = max(len(here.model) for here in found)
    return [
        f"  {number}  {here.model:{longest}}  {size_of(here.size)}"
        for number, here in enumerate(found, 1)
    ]
