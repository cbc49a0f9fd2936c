"""Constrained decoding: JSON schemas, expressions, tool calls."""

from quintet.errors import MissingDependencyError
from quintet.grammar.constraints import (
    Constraint,
    choice,
    json_object,
    json_schema,
    lark,
    regex,
)

try:
    from quintet.grammar.calls import tool_calls, unbound
    from quintet.grammar.compiling import Grammars, compile
except ModuleNotFoundError as error:
    if error.name != "llguidance":
        raise
    raise MissingDependencyError(
        'texts that follow a grammar need llguidance: pip install "quintet[serve]"'
    ) from None
from quintet.grammar.processor import GrammarProcessor

__all__ = [
    "Constraint",
    "GrammarProcessor",
    "Grammars",
    "choice",
    "compile",
    "json_object",
    "json_schema",
    "lark",
    "regex",
    "tool_calls",
    "unbound",
]
