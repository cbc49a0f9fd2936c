"""Constrained decoding: compiles the form of an answer to a logits processor."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from quintet.errors import GrammarError, InputError, TokenizerError
from quintet.generation.requests import Served
from quintet.grammar import (
    Constraint,
    GrammarProcessor,
    Grammars,
    json_object,
    json_schema,
    lark,
    regex,
    tool_calls,
)
from quintet.parsing import Format, format_of, opening_of
from quintet.parsing.format import END_THINK
from quintet.server.failures import invalid, unavailable
from quintet.server.form_figures import FormFigures
from quintet.tokenization import PreTrainedTokenizer

# Seconds in which the form of an answer is compiled, and how many are at once.
SECONDS, AT_ONCE = 5.0, 4


class Shapes:
    """Makes constraint processors for one model; thread-safe.

    The tokenizer is read when this is made, not when a form is asked for first: llguidance holds
    all other threads for seconds meanwhile.

    Args:
        model: whose logits these are.
        tokenizer: of the model.
        calls: how the model writes calls of tools; None for what its template says.

    Attributes:
        figures: count what is compiled and refused.
    """

    def __init__(
        self, model: Served, tokenizer: PreTrainedTokenizer, calls: Format | None = None
    ) -> None:
        self._tokenizer, self._calls, self._missing = tokenizer, calls, ""
        self.figures = FormFigures()
        self._places = threading.Semaphore(AT_ONCE)
        self._grammars: Grammars | None = None
        try:
            self._grammars = Grammars(
                tokenizer,
                model.config.vocab_size,
                eos_token_id=model.generation_config.eos_token_ids or None,
            )
        except (InputError, TokenizerError) as error:
            self._missing = str(error)

    def processor(
        self,
        form: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        prompt_text: str,
        *,
        parallel: bool,
        where: str = "response_format",
    ) -> GrammarProcessor | None:
        """Return the processor for a form, or None.

        Args:
            form: `Ask.response_format`; of what is said instead of calls, where there are tools.
            tools: those that may be called.
            choice: "auto", "none", "required" or the name of a tool.
            prompt_text: what the answer follows; a thought that it opens is free.
            parallel: whether there may be several calls.
            where: the field of the request that has the form.

        Raises:
            ApiError: form or tools are wrong, contradict themselves, are too complex or none that
                this model can be held to, by their field; or those of others take too long.
        """
        calls = bool(tools) and choice != "none"
        if form is None and not calls:
            return None

        def compiled(constraint: Constraint) -> GrammarProcessor:
            if self._grammars is None:
                raise InputError(f"no answer of this model can be held to a form: {self._missing}")
            thinks = opening_of(self._tokenizer, prompt_text) == "reasoning"
            return self._grammars.compile(constraint, after=END_THINK if thinks else None)

        def make() -> GrammarProcessor | None:
            constraint = None
            if form is not None:
                with _blamed(where):
                    constraint = _constraint_of(form)
                    if not calls:
                        return compiled(constraint)
            with _blamed("tools"):
                joined = self._with_calls(constraint, tools, choice, parallel=parallel)
                if joined is None:
                    return None
                try:
                    return compiled(joined)
                except GrammarError:
                    if constraint is None:
                        raise
            with _blamed(where):
                # Alone, it shows whether it is to blame.
                compiled(constraint)
            with _blamed("tools"):
                return compiled(joined)

        return self._in_time(make, "tools" if calls else where)

    def _in_time(
        self, make: Callable[[], GrammarProcessor | None], where: str
    ) -> GrammarProcessor | None:
        """Return the compiled processor, or raise an error after a time limit.

        Nothing ends it then. A few such threads are all that there are, and none is waited for when
        the process ends.

        Raises:
            ApiError: it takes too long, or others do; or what it raises.
        """
        results: queue.SimpleQueue[GrammarProcessor | Exception | None] = queue.SimpleQueue()
        if not self._places.acquire(timeout=SECONDS):
            self.figures.refuse("busy")
            raise unavailable(
                "forms of other answers are read, which take long; try again", "forms_busy", SECONDS
            )
        compilation = self.figures.begin()

        def run() -> None:
            try:
                results.put(make())
            except Exception as error:
                results.put(error)
            finally:
                compilation.end()
                self._places.release()

        threading.Thread(target=run, name="quintet-form", daemon=True).start()
        try:
            found = results.get(timeout=SECONDS)
        except queue.Empty:
            compilation.give_up()
            raise invalid(
                f"{where}: the form of the answer takes longer than {SECONDS:g} s to be read; make "
                "it simpler",
                where,
            ) from None
        if isinstance(found, Exception):
            self.figures.refuse("invalid")
            raise found
        return found

    def _with_calls(
        self,
        constraint: Constraint | None,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        *,
        parallel: bool,
    ) -> Constraint | None:
        """Return the constraint of tool calls and of text, or None if there is neither."""
        strict = any(tool["function"].get("strict") for tool in tools)
        if choice == "auto" and not strict and constraint is None:
            return None
        written = self._calls or format_of(self._tokenizer)
        if written is None:
            raise InputError(
                "this model's chat template writes no calls of tools, so that none can be asked "
                "for; leave tools and tool_choice out"
            )
        return tool_calls(tools, written, choice, parallel, constraint)


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    """Raise an InputError again as an ApiError that names the field `where`.

    Raises:
        ApiError: it is.
    """
    try:
        yield
    except InputError as error:
        raise invalid(f"{where}: {error}", where) from None


def _constraint_of(form: Mapping[str, Any]) -> Constraint:
    match form:
        case {"type": "json_object"}:
            return json_object()
        case {"type": "json_schema", "schema": schema}:
            return json_schema(schema)
        case {"type": "regex", "pattern": pattern}:
            return regex(pattern)
        case {"type": "grammar", "grammar": grammar}:
            return lark(grammar)
    raise InputError("there is no such form of an answer")
