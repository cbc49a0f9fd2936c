"""Explains why a grammar or schema cannot be used."""

import json
import time
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from quintet.errors import shown
from quintet.grammar.schema import schemas_in

# What a grammar may take to be read, and then at each token: about 250 ms and 15 ms at the worst;
# and how much its lexer may remember, of which 20,000 states are 30 MB.
LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,
    max_lexer_states=20_000,
    step_max_items=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# JSON as most programs write it: a space behind a comma or a colon, or none; and no others, which
# a model could write without an end.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
}
# For so many seconds the one that cannot be used is looked for in a schema.
PATIENCE = 0.5
_COMPLEX = "it is too complex; make it simpler, and repetitions and lists shorter"
# What llguidance's words mean to who has written the grammar.
_WORDS = {
    "oneOf constraints": "oneOf is supported where no two of its members can hold at once; "
    "anyOf always is",
    "NoExtension": "it allows no text at all",
    "Parser Error: Current row has": "at one place too much can come next, as where a schema has "
    "about 500 optional properties in a row; require some, or nest them",
    # Only tokens that it allows are tried: a lexer at its end says so in this way, too.
    "Parser Error: token": _COMPLEX,
    "lexer error": _COMPLEX,
    "initial lexer configuration": _COMPLEX,
    "schema too large": "it is too large, with all that its parts make together; make it simpler",
    "fuel exhausted": "it is too complex; make it simpler, and numbers smaller",
}


def clear_reason(reason: str) -> str:
    """Return llguidance's error in one line."""
    for words, meant in _WORDS.items():
        if reason.startswith(words):
            return meant
    lines = (line.strip() for line in reason.splitlines())
    return shown(" ".join(line for line in lines if line and line != "<non-verbose/>"))


def schema_fault(schema: str) -> str:
    """Return the place and reason of a schema's fault, or ""."""
    root: dict[str, Any] = json.loads(schema)
    reason, place, inner = _fault(root), "#", root
    until = time.monotonic() + PATIENCE
    while reason:
        for inside, one in schemas_in(inner, place):
            if time.monotonic() > until:
                return _at(place, reason)
            below = isinstance(one, dict) and _fault(_alone(one, root))
            # What it refers to may be elsewhere than in what is tried.
            if below and not below.startswith("Pointer"):
                reason, place, inner = below, inside, one
                break
        else:
            return _at(place, reason)
    return ""


def _at(place: str, reason: str) -> str:
    return f"at {shown(place)}: {clear_reason(reason)}"


def _alone(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """Return a subschema with the definitions of its root."""
    return {key: root[key] for key in ("$defs", "definitions") if key in root} | dict(schema)


def _fault(schema: Mapping[str, Any]) -> str:
    grammar = {"grammars": [{"json_schema": {**schema, "x-guidance": JSON_STYLE}}]}
    wrong, found = LLMatcher.validate_grammar_with_warnings(json.dumps(grammar), limits=LIMITS)
    return found[0] if wrong else ""
