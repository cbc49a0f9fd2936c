"""A command beside which stand others, by a first word of their own and with other options."""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import click


class DispatchingCommand(click.Command):
    """One command, and beside it others.

    Attributes:
        others: the modules of `quintet.cli` that have these as `command`, by their first words.
    """

    others: ClassVar[Mapping[str, str]]

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the arguments, for the command that the first of them names."""
        word = args[0] if args else ""
        if word not in self.others:
            return super().make_context(info_name, args, parent, **extra)
        other = importlib.import_module(f"quintet.cli.{self.others[word]}").command
        context: click.Context = other.make_context(
            f"{self.name} {word}", args[1:], parent, **extra
        )
        return context
