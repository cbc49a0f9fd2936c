"""Bounds for llguidance's work where it has no limit of its own.

It makes one expression of all that hold for a text at once, compares all expressions of names in
pairs, and has a state for each remainder of a division. Each is quick up to a point, and takes
minutes soon after it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from quintet.errors import GrammarError
from quintet.grammar.schema import checked_schema, schemas_in, target

# Expressions that hold for one text, expressions of names, and remainders, of a whole schema.
MAX_MEETING, MAX_NAMES, MAX_REMAINDERS = 6, 64, 100_000
# What is written in a grammar and is no operator of it.
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/')


def bounded_schema(schema: Mapping[str, Any] | str, most: int) -> str:
    """Return the text of a schema, like `checked_schema`.

    Raises:
        GrammarError: as there, or it takes too long to be read.
    """
    text = checked_schema(schema, most)
    check_schema(json.loads(text))
    return text


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check a schema whose references lead somewhere.

    Raises:
        GrammarError: it takes too long to be read.
    """
    names = remainders = 0
    for one in _all(schema):
        patterns = one.get("patternProperties")
        names += len(patterns) if isinstance(patterns, dict) else 0
        remainders += _remainders(one.get("multipleOf"))
    if names > MAX_NAMES:
        raise GrammarError(
            f"the JSON schema has {names} patternProperties, and at most {MAX_NAMES} are compared "
            "with each other; name fewer"
        )
    if remainders > MAX_REMAINDERS:
        raise GrammarError(
            f"multipleOf comes to {remainders:,} remainders in this JSON schema, and at most "
            f"{MAX_REMAINDERS:,} are followed; divide by smaller numbers"
        )
    meeting: dict[int, int] = {}
    if max((_meeting(one, schema, meeting) for one in _all(schema)), default=0) > MAX_MEETING:
        raise GrammarError(
            f"more than {MAX_MEETING} patterns hold for one text of this JSON schema; say them in "
            "one"
        )


def check_lark(text: str) -> None:
    """Check a grammar, and the schemas in it.

    Raises:
        GrammarError: it takes too long to be read.
    """
    if _QUOTED.sub("", text).count("&") > MAX_MEETING:
        raise GrammarError(
            f"the grammar has more than {MAX_MEETING} operators &; say what holds in one expression"
        )
    for found in re.finditer(r"%json\s*", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(schema, dict):
            check_schema(schema)


def _all(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield schema
    for _, inner in schemas_in(schema):
        if isinstance(inner, dict):
            yield from _all(inner)


def _remainders(divisor: object) -> int:
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or divisor == 0:
        return 0
    exact = Decimal(repr(divisor))
    exponent = exact.as_tuple().exponent
    # Of a fraction, so many of its last digit.
    return int(abs(exact.scaleb(-min(exponent, 0)))) if isinstance(exponent, int) else 0


def _meeting(schema: Any, root: Mapping[str, Any], known: dict[int, int]) -> int:
    """Return the number of patterns that may hold for one text."""
    if not isinstance(schema, dict):
        return 0
    if id(schema) not in known:
        # What leads back to itself adds nothing.
        known[id(schema)] = 0
        count = int("pattern" in schema) + int("format" in schema)
        if "$ref" in schema:
            count += _meeting(target(schema["$ref"], root, "#"), root, known)
        for keyword, join in (("allOf", sum), ("anyOf", max), ("oneOf", max)):
            members = schema.get(keyword)
            if isinstance(members, list) and members:
                count += join([_meeting(one, root, known) for one in members])
        known[id(schema)] = count
    return known[id(schema)]
