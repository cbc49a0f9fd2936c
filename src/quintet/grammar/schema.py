"""Checks of JSON schemas."""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from quintet.errors import GrammarError, shown

# How deep schemas may stand in each other, and how often one is looked at.
MAX_DEPTH = 64
MAX_LOOKS = 200_000
# Where schemas stand in a schema: alone, in a list, by name.
_ALONE = frozenset({"items", "additionalProperties"})
_LISTED = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_RULES = frozenset(
    {
        *("$ref", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maxItems"),
        *("maxLength", "maxProperties", "maximum", "minItems", "minLength", "minProperties"),
        *("minimum", "multipleOf", "pattern", "required", "type"),
    }
)
# What describes, and binds nothing. A discriminator only says how to tell members of a oneOf apart.
_NOTES = frozenset(
    {
        *("$anchor", "$comment", "$id", "$schema", "default", "deprecated", "description"),
        *("discriminator", "example", "examples", "id", "readOnly", "title", "writeOnly"),
    }
)
_KNOWN = _ALONE | _LISTED | _NAMED | _RULES | _NOTES


def checked_schema(schema: Mapping[str, Any] | str, most: int) -> str:
    """Return the text of a schema.

    Args:
        schema: it, or its text.
        most: how many bytes it may have.

    Raises:
        GrammarError: it is none, too long or too deep, has a keyword that is not supported, refers
            to what is not in it, or nothing finite is valid.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text, parse_constant=_no_number)
        text = json.dumps(found, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {shown(str(error))}") from None
    if not isinstance(found, dict):
        raise GrammarError(f"the JSON schema {shown(found)} has to be an object")
    if len(text) > most:
        raise GrammarError(
            f"the JSON schema has {len(text):,} bytes, and at most {most:,} are read; shorten it"
        )
    try:
        _check(found, found)
        _Finite(found).check()
    except RecursionError:
        raise GrammarError("the JSON schema is too deep; name inner schemas in $defs") from None
    return text


def schemas_in(schema: Mapping[str, Any], place: str = "#") -> Iterator[tuple[str, Any]]:
    """Yield the direct subschemas of a schema, with their paths."""
    for keyword, value in schema.items():
        inside = f"{place}/{_escaped(keyword)}"
        if keyword in _ALONE:
            yield inside, value
        elif keyword in _LISTED and isinstance(value, list):
            yield from ((f"{inside}/{number}", one) for number, one in enumerate(value))
        elif keyword in _NAMED and isinstance(value, dict):
            yield from ((f"{inside}/{_escaped(name)}", one) for name, one in value.items())


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check(
    schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "#", deep: int = 0
) -> None:
    if deep > MAX_DEPTH:
        raise GrammarError(
            f"at {shown(at)} the JSON schema is more than {MAX_DEPTH} schemas deep; name inner "
            "ones in $defs"
        )
    for keyword, value in schema.items():
        if keyword == "$ref":
            target(value, root, at)
        # Whoever writes x-…, writes it for other programs.
        elif keyword not in _KNOWN and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise GrammarError(
                f"at {shown(at)} the JSON schema has the keyword {shown(keyword)}, which is not "
                f"supported; leave it out, or say it with {', '.join(sorted(_RULES - {'$ref'}))}"
            )
    for inside, one in schemas_in(schema, at):
        if isinstance(one, dict):
            _check(one, root, inside, deep + 1)
        elif not isinstance(one, bool):
            raise GrammarError(
                f"at {shown(inside)} the JSON schema has {shown(one)}, which is neither an object "
                "nor true or false"
            )


def target(ref: object, root: Any, at: str) -> Any:
    """Return the schema that a reference names.

    Raises:
        GrammarError: it names none.
    """
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        raise GrammarError(
            f"at {shown(at)} the JSON schema has $ref={shown(ref)}; only places within it can be "
            "referred to, as '#/$defs/name', and nothing is ever fetched"
        )
    found = root
    for part in unquote(ref).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise GrammarError(
                f"at {shown(at)} the JSON schema has $ref={shown(ref)}, and there is no such place "
                "in it"
            )
    return found


class _Finite:
    """Decides whether a schema has finite values.

    What is referred to is taken for impossible at first, and then for possible where a value could
    do with what is known to be so; that is done again until nothing changes.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema, self._looks = schema, 0
        self._targets: dict[str, Any] = {}
        self._collect(schema)
        self._possible = dict.fromkeys(self._targets, False)

    def check(self) -> None:
        while True:
            new = [ref for ref, can in self._possible.items() if not can and self._can_be(ref)]
            if not new:
                break
            self._possible.update(dict.fromkeys(new, True))
        if not self._can(self._schema):
            ref = next((ref for ref, can in self._possible.items() if not can), "#")
            raise GrammarError(
                f"at {shown(ref)} the JSON schema asks for a value that has another of its kind "
                "inside, and so on without an end; make the inner one optional"
            )

    def _collect(self, schema: Any) -> None:
        if not isinstance(schema, dict):
            return
        ref = schema.get("$ref")
        if ref is not None and ref not in self._targets:
            self._targets[ref] = target(ref, self._schema, "#")
            self._collect(self._targets[ref])
        for _, one in schemas_in(schema):
            self._collect(one)

    def _can_be(self, ref: str) -> bool:
        return self._can(self._targets[ref])

    def _can(self, schema: Any) -> bool:
        self._looks += 1
        if self._looks > MAX_LOOKS:
            raise GrammarError("the JSON schema refers to itself in too many ways; make it simpler")
        if not isinstance(schema, dict):
            return schema is not False
        if not self._possible.get(schema.get("$ref", ""), True):
            return False
        for keyword, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            members = schema.get(keyword)
            if isinstance(members, list) and not enough(self._can(one) for one in members):
                return False
        kind = schema.get("type")
        if kind in ("object", ["object"]):
            return all(self._can(one) for one in _required(schema))
        if kind in ("array", ["array"]):
            return all(self._can(one) for one in _least(schema))
        return True


def _required(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas that an object requires."""
    names, inside = schema.get("required"), schema.get("properties")
    if not isinstance(names, list) or not isinstance(inside, dict):
        return []
    return [inside[name] for name in names if isinstance(name, str) and name in inside]


def _least(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas that an array requires."""
    least, listed = schema.get("minItems"), schema.get("prefixItems")
    if not isinstance(least, int) or least < 1:
        return []
    first = listed[:least] if isinstance(listed, list) else []
    return [*first, schema.get("items", True)] if least > len(first) else first
