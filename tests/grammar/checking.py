"""What tests of grammars share: schemas at random, what is valid by them, and texts at random."""

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from quintet.grammar import GrammarProcessor

NAMES = st.sampled_from(["a", "b", "key", "größe", 'q"', "x/y"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
CONSTANTS = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), TEXTS)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """JSON schemas of which a value can be found."""
    whole = st.tuples(st.integers(-50, 50), st.integers(0, 60)).map(
        lambda x: {"type": "integer", "minimum": x[0], "maximum": x[0] + x[1]}
    )
    text = st.tuples(st.integers(0, 2), st.integers(0, 4)).map(
        lambda x: {"type": "string", "minLength": x[0], "maxLength": x[0] + x[1]}
    )
    leaves = st.one_of(
        st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "number"}]),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
        st.lists(CONSTANTS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        CONSTANTS.map(lambda value: {"const": value}),
        whole,
        text,
    )
    return st.recursive(leaves, _around, max_leaves=6)


def _around(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + x[2]}
    )
    objects = st.dictionaries(NAMES, inner, max_size=3).flatmap(
        lambda inside: st.lists(st.sampled_from([*inside] or [""]), unique=True).map(
            lambda names: {
                "type": "object",
                "properties": inside,
                "required": [name for name in names if name in inside],
                "additionalProperties": False,
            }
        )
    )
    return st.one_of(
        arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x})
    )


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Tell whether a value is what such a schema describes."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
        )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "number":
            return number
        case "integer":
            return number and schema["minimum"] <= value <= schema["maximum"] and value % 1 == 0
        case "string" if "pattern" in schema:
            return isinstance(value, str) and 1 <= len(value) <= 3 and set(value) <= set("abc")
        case "string":
            return (
                isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
            )
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(valid(one, schema["items"]) for one in value)
            )
    return (
        isinstance(value, dict)
        and {*schema["required"]} <= {*value} <= {*schema["properties"]}
        and all(valid(one, schema["properties"][name]) for name, one in value.items())
    )


def at_random(
    processor: GrammarProcessor,
    V: int,
    end: int,
    seed: int,
    *,
    most: int = 120,
    prompt: tuple[int, ...] = (1, 2, 3),
) -> list[int]:
    """Write with random scores, which like the end; return what was written, with its end."""
    dice = np.random.default_rng(seed)
    ids = [*prompt]
    while len(ids) - len(prompt) < most:
        scores = torch.from_numpy(dice.standard_normal((1, V), dtype=np.float32))
        scores[0, end] += 4
        masked = processor(torch.tensor([ids]), scores)
        assert masked.amax() > -math.inf
        kept = ~masked.isneginf()
        assert torch.equal(masked[kept], scores[kept])
        ids.append(int(masked.argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]
