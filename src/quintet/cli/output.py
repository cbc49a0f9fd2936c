"""Command output: a table for people, JSON for programs."""

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from quintet.cli.terminal import width


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact in words, with its value in JSON for programs.

    Attributes:
        text: the words; None if only programs are told.
        value: of JSON.
    """

    text: str | None
    value: Any


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, one a line, or as one JSON object with names that programs can use."""
    if as_json:
        click.echo(json.dumps(_for_programs(facts), indent=2))
        return
    facts = {key: _for_people(value) for key, value in facts.items()}
    facts = {key: value for key, value in facts.items() if value != Fact(None, None)}
    label_width = max(map(len, facts), default=0)
    columns = width(sys.stdout)
    for key, value in facts.items():
        lines = list(value.items()) if isinstance(value, Mapping) else [(None, value)]
        for number, (name, item) in enumerate(lines):
            label = key if number == 0 else ""
            text = _text(item) if name is None else f"{name}: {_text(item)}"
            line = f"{label:{label_width}}  {text}".rstrip()
            click.echo(line if columns is None else _folded(line, columns, label_width + 2))


def _folded(line: str, columns: int, indent: int) -> str:
    """Return a line in lines of a terminal, further ones below the first one's value."""
    if len(line) <= columns or columns < 2 * indent:
        return line
    room, head, value = columns - indent, line[:indent], line[indent:]
    lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)
    return head + f"\n{'':{indent}}".join(lines)


def _for_programs(value: Any) -> Any:
    if isinstance(value, Fact):
        return value.value
    if isinstance(value, Mapping):
        return {str(k).replace(" ", "_"): _for_programs(v) for k, v in value.items()}
    return value


def _for_people(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _for_people(item) for key, item in value.items()}
    if isinstance(value, Fact):
        return Fact(None, None) if value.text is None else value.text
    return value


def table(rows: Sequence[Mapping[str, Any]], as_json: bool, empty: str) -> None:
    """Print rows of the same keys, as columns or as a JSON list."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    lines = [[key.upper() for key in rows[0]], *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        padded = (cell.ljust(most) for cell, most in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def size_of(count: int) -> str:
    """Return a number of bytes as people say it."""
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e6:.2f} MB"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "-" if value is None else str(value)
