"""The form of an answer: `response_format`, and `regex` and `grammar` beside it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from quintet.server.failures import invalid
from quintet.server.protocol.common import Body, within
from quintet.server.settings import Settings

# The field of a request that has a form, by the type of the form.
_FIELDS = {
    "json_object": "response_format",
    "json_schema": "response_format.json_schema.schema",
    "regex": "regex",
    "grammar": "grammar",
}


class JsonSchema(Body):
    """A schema with its name, which has no effect on the answer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON by a schema."""

    REFUSED: ClassVar = {"schema": "put it into json_schema.schema"}

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def format_of(
    response_format: ResponseFormat | None,
    regex: str | None,
    grammar: str | None,
    settings: Settings,
) -> Mapping[str, Any] | None:
    """Return the form, as `Ask.response_format` has it; None for any text.

    Raises:
        ApiError: several, none of a schema, or one that is too large.
    """
    requested: list[Mapping[str, Any]] = []
    if response_format is not None and response_format.type != "text":
        if response_format.type == "json_object":
            requested.append({"type": "json_object"})
        else:
            requested.append({"type": "json_schema", "schema": _schema(response_format, settings)})
    if regex is not None:
        within("regex", len(regex), settings.schema, "characters")
        requested.append({"type": "regex", "pattern": regex})
    if grammar is not None:
        within("grammar", len(grammar), settings.schema, "characters")
        requested.append({"type": "grammar", "grammar": grammar})
    if len(requested) > 1:
        raise invalid(
            "response_format: there is one of response_format, regex and grammar; leave the others "
            "out",
            "response_format",
        )
    return requested[0] if requested else None


def field_of(form: Mapping[str, Any] | None) -> str:
    """Return the field of a request that has a form."""
    return "response_format" if form is None else _FIELDS[form["type"]]


def _schema(given: ResponseFormat, settings: Settings) -> Mapping[str, Any]:
    where = "response_format.json_schema"
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise invalid(f"{where}: it needs a name and a schema", where)
    within(f"{where}.schema", len(json.dumps(given.json_schema.schema_)), settings.schema, "bytes")
    return given.json_schema.schema_
