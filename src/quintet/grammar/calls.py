"""Grammars of tool calls in a model's own format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quintet.errors import GrammarError, shown
from quintet.grammar.bounds import bounded_schema
from quintet.grammar.constraints import MAX_SOURCE, Constraint, literal
from quintet.grammar.faults import JSON_STYLE, schema_fault
from quintet.grammar.vocabulary import GrammarVocabulary
from quintet.parsing.format import Format

MAX_TOOLS = 128
# How many bytes their schemas may have together; those take a second to be compiled.
MAX_SCHEMAS = 4 * MAX_SOURCE
# What nothing is asked of, and what no arguments are.
_ANY_OBJECT = '{"type":"object"}'
_NOTHING = '{"type":"object","properties":{},"additionalProperties":false}'
_TEXT = "/(?s:.)+/"
_THOUGHTS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class _Calls(Constraint):
    """Tool calls, or text that may contain some.

    Attributes:
        tools: the name of each and the schema of its arguments.
        format: how calls are written.
        free: whether a text may come before them, or instead.
        parallel: whether there may be several.
        answer: what a text without calls is to be, where one may come instead; None for any.
    """

    tools: tuple[tuple[str, str], ...]
    format: Format
    free: bool
    parallel: bool
    answer: Constraint | None

    @property
    def kind(self) -> str:
        return "grammar of calls"

    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        form = self.format
        # Each call begins with the trigger, where nothing else does before the first.
        trigger = "" if form.begin else form.trigger
        again = f"({_parts(form, form.between + trigger)} call)*" if self.parallel else ""
        rules, inner = [f"calls: call {again} {_parts(form, form.end)}"], []
        for number, (name, schema) in enumerate(self.tools):
            inside = literal(name)[1:-1] if form.style == "json" else name
            head = form.before_name.removeprefix(trigger) + inside + form.before_arguments
            behind = _parts(form, form.after_arguments)
            rules.append(f"call_{number}: {_parts(form, head)} @tool_{number} {behind}")
            arguments = json.loads(schema) | {"x-guidance": JSON_STYLE}
            inner.append({"name": f"tool_{number}", "json_schema": arguments})
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(self.tools))))
        rules += self._beginning(form.begin or trigger)
        if self.free and self.answer is not None:
            whole, *others = self.answer.grammar(vocabulary)
            inner += [whole | {"name": "instead"}, *others]
        return [{"name": "text", "lark_grammar": "\n".join(rules)}, *inner]

    def _beginning(self, opening: str) -> list[str]:
        form, opens = self.format, _parts(self.format, opening)
        if not self.free:
            return [f"start: {opens} calls"]
        if self.answer is not None:
            return [f"start: @instead | {opens} calls"]
        if form.trigger in form.tokens:
            # No text is made of what is a token, so the first such one tells where calls begin.
            thoughts = [form.tokens[mark] for mark in _THOUGHTS if mark in form.tokens]
            pieces = " | ".join(["TEXT", *(f"<[{token}]>" for token in thoughts)])
            return [f"start: free ({opens} calls)?", f"free: ({pieces})*", f"TEXT: {_TEXT}"]
        rest = _parts(form, opening.removeprefix(form.trigger))
        return [
            f"start: TEXT? | head {rest} calls",
            f"head[lazy]: TEXT? {literal(form.trigger)}",
            f"TEXT: {_TEXT}",
        ]


def tool_calls(
    tools: Sequence[Mapping[str, Any]],
    format: Format,
    choice: str = "required",
    parallel: bool = True,
    answer: Constraint | None = None,
) -> Constraint:
    """Return the constraint of tool calls with valid arguments.

    Args:
        tools: {"type": "function", "function": {"name", "parameters", "strict"}}, as for
            `apply_chat_template`. Where a schema is not supported and "strict" is not true, the
            arguments are any object.
        format: how the model writes calls: `parsing.format_of(tokenizer)`.
        choice: "required" for any of them, the name of one, or "auto" for any text, in which calls
            are bound where they begin.
        parallel: whether there may be more than one call.
        answer: with "auto", what a text is to be if it is no calls.

    Raises:
        GrammarError: there is no tool, no such tool, or the schema of a strict one is not
            supported.
    """
    size = sum(len(json.dumps(tool, default=str)) for tool in tools)
    if size > MAX_SCHEMAS:
        raise GrammarError(
            f"the tools have {size:,} bytes together, and a grammar is made of at most "
            f"{MAX_SCHEMAS:,}; offer fewer"
        )
    read = dict(_tool(tool) for tool in tools)
    if not 1 <= len(tools) <= MAX_TOOLS or len(read) < len(tools):
        raise GrammarError(
            f"{len(tools)} tools, of which {len(read)} have a name of their own, were given; there "
            f"have to be 1 to {MAX_TOOLS}, of different names"
        )
    if choice not in ("auto", "required"):
        if choice not in read:
            raise GrammarError(
                f"tool_choice={shown(choice)} is none of the tools {shown(list(read))}"
            )
        read = {choice: read[choice]}
    return _Calls(tuple(read.items()), format, choice == "auto", parallel, answer)


def unbound(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of tools whose arguments `tool_calls` takes for any object.

    Raises:
        GrammarError: a tool has no name, or the schema of a strict one is not supported.
    """
    # What is asked for may be as loose, but is another text.
    return [name for name, schema in map(_tool, tools) if schema is _ANY_OBJECT]


def _tool(tool: Mapping[str, Any]) -> tuple[str, str]:
    """Return a tool's name and the schema of its arguments."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise GrammarError(f"the tool {shown(tool)} has no function with a name")
    parameters = function.get("parameters")
    if parameters is None:
        return name, _NOTHING
    try:
        schema = bounded_schema(parameters, MAX_SOURCE)
        if fault := schema_fault(schema):
            raise GrammarError(f"the JSON schema cannot be used: {fault}")
    except GrammarError as error:
        if function.get("strict"):
            raise GrammarError(f"the tool {shown(name)} is strict, and {error}") from None
        return name, _ANY_OBJECT
    return name, schema


def _parts(form: Format, text: str) -> str:
    """Write part of a format as grammar: texts, and token ids."""
    pieces = form.pieces(text)
    return " ".join(f"<[{one}]>" if isinstance(one, int) else literal(one) for one in pieces)
