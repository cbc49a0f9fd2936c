"""What would take minutes to be read is refused before, and what takes a moment is not."""

import time
from typing import Any

import pytest

from quintet.errors import GrammarError
from quintet.grammar import json_schema, lark, tool_calls
from quintet.parsing import HERMES


def held(count: int) -> list[dict[str, Any]]:
    return [{"pattern": f"^.*x{n}.*$"} for n in range(count)]


def nested(count: int, keyword: str) -> dict[str, Any]:
    """Return patterns of which each holds beside all that stand in it."""
    schema: dict[str, Any] = {"type": "string"}
    for one in held(count):
        schema = {**one, keyword: [schema]}
    return schema


def chained(count: int) -> dict[str, Any]:
    links = {f"d{n}": {**one, "$ref": f"#/$defs/d{n + 1}"} for n, one in enumerate(held(count))}
    return {"$defs": {**links, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def doubled(depth: int) -> dict[str, Any]:
    """Return a pattern that two to the power of a depth ask for."""
    twice = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$defs": {**twice, f"d{depth}": held(1)[0]}, "$ref": "#/$defs/d0"}


BOMBS: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "allOf": held(24)}, "patterns hold for one text"),
    ({"properties": {"a": {"items": {"allOf": held(300)}}}}, "patterns hold for one text"),
    (nested(24, "anyOf"), "patterns hold for one text"),
    (nested(24, "oneOf"), "patterns hold for one text"),
    (chained(24), "patterns hold for one text"),
    (doubled(20), "patterns hold for one text"),
    ({"patternProperties": {f"^c{n}[a-z]*$": {} for n in range(400)}}, "400 patternProperties"),
    ({"type": "integer", "multipleOf": 9_999_991}, "9,999,991 remainders"),
    ({"type": "number", "multipleOf": 1.234567}, "1,234,567 remainders"),
    ({"type": "integer", "multipleOf": 10**300}, "remainders"),
    (
        {"properties": {f"k{n}": {"type": "integer", "multipleOf": 10_007} for n in range(100)}},
        "1,000,700 remainders",
    ),
]


@pytest.mark.parametrize(("schema", "said"), BOMBS, ids=range(len(BOMBS)))
def test_schemas_that_take_minutes_are_refused(schema: dict[str, Any], said: str) -> None:
    began = time.process_time()
    with pytest.raises(GrammarError, match=said):
        json_schema(schema)
    inside = {"type": "object", "properties": {"a": schema}}
    tool = {"name": "f", "strict": True, "parameters": inside}
    if "$defs" not in schema:
        with pytest.raises(GrammarError, match=said):
            tool_calls([{"type": "function", "function": tool}], HERMES)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("start: T\nT: " + " & ".join(f"/.*x{n}.*/" for n in range(24)), "operators &"),
        (
            "start: T0\n"
            + "\n".join(f"T{n}: T{n + 1} & /.*x{n}.*/" for n in range(24))
            + '\nT24: "a"',
            "operators &",
        ),
        ('start: j\nj: %json {"type": "integer", "multipleOf": 9999991}', "remainders"),
        ('start: j\nj: %json{"allOf": ' + str(held(24)).replace("'", '"') + "}", "patterns"),
    ],
)
def test_grammars_that_take_minutes_are_refused(text: str, said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        lark(text)


def test_what_takes_a_moment_is_taken() -> None:
    for schema in (
        {"type": "string", "allOf": held(4)},
        {"properties": {f"k{n}": {"type": "string", **held(1)[0]} for n in range(100)}},
        {"anyOf": held(20)},
        {"patternProperties": {f"^c{n}[a-z]*$": {} for n in range(60)}},
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 86_400},
        {"$defs": {"n": {"pattern": "a", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    ):
        assert json_schema(schema)
    assert lark('start: "&&&&&&&&" /[&]&&&&&&&&&&/ T\nT: /a/ & /b/')
    assert lark("start: %json {broken")
