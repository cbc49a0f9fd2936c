"""Constrained answers: `--json-schema` and `--regex`, local or through a server."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from quintet.errors import InputError

if TYPE_CHECKING:
    from quintet.cli.options import Opened
    from quintet.grammar import GrammarProcessor

MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """A form; without schema and expression any text has it."""

    schema: str | None = None
    pattern: str | None = None

    def __bool__(self) -> bool:
        return self.schema is not None or self.pattern is not None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that a server is sent for it."""
        if self.pattern is not None:
            return {"regex": self.pattern}
        if self.schema is None:
            return {}
        try:
            schema = json.loads(self.schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the file of --json-schema is no JSON: {error}") from None
        named = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    def maker(self, opened: "Opened") -> Callable[[str], list["GrammarProcessor"]]:
        """Return a maker of processors for a text behind a prompt; the tokenizer is read now.

        Raises:
            GrammarError: the schema or the expression cannot be used.
            MissingDependencyError: llguidance is not installed.
        """
        if not self:
            return lambda prompt: []
        from quintet import grammar
        from quintet.parsing.format import END_THINK, THINK

        form = (
            grammar.regex(self.pattern)
            if self.pattern is not None
            else grammar.json_schema(self.schema or "")
        )
        model = opened.generator_model
        ends = model.generation_config.eos_token_ids or None
        grammars = grammar.Grammars(opened.tokenizer, model.config.vocab_size, eos_token_id=ends)
        # So that a mistake is told before a question is read.
        grammars.compile(form)

        def processors(prompt: str) -> list[grammar.GrammarProcessor]:
            thinks = prompt.rstrip().endswith(THINK)
            return [grammars.compile(form, after=END_THINK if thinks else None)]

        return processors


def shape_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of an answer's form; the command gets a `shape`."""

    @functools.wraps(command)
    def collecting(*, json_schema: str | None, regex: str | None, **given: Any) -> None:
        if json_schema is not None and regex is not None:
            raise InputError("--json-schema and --regex are two forms; give one of them")
        schema = None
        if json_schema is not None:
            from quintet.cli.texts import text_of_file

            schema = text_of_file(json_schema, MAX_BYTES)
        command(shape=AnswerShape(schema, regex), **given)

    for option in (
        click.option("--regex", metavar="PATTERN", help="What the answer has to match."),
        click.option(
            "--json-schema",
            type=click.Path(),
            metavar="FILE",
            help="Answer in JSON by the schema in a file.",
        ),
    ):
        collecting = option(collecting)
    return collecting
