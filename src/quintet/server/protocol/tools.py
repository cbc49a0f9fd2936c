"""Tools that are offered, and which of them are to be called, in no protocol's words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from quintet.errors import shown
from quintet.server.failures import invalid
from quintet.server.protocol.common import within
from quintet.server.settings import Settings

Tools = tuple[Mapping[str, Any], ...]
MODES = ("auto", "none", "required")


def _object(text: str) -> str:
    try:
        read = json.loads(text or "{}")
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise ValueError("arguments have to be a JSON object")
    return text


# Of a call, as they were written.
Arguments = Annotated[str, AfterValidator(_object)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


@dataclass(frozen=True, slots=True)
class Offered:
    """A function that may be called.

    Attributes:
        where: it stands in the request.
        name: what calls it.
        description: what it does.
        parameters: a JSON schema; None if it takes none.
        strict: whether arguments have to keep to that; None if nothing is said.
    """

    where: str
    name: str
    description: str | None
    parameters: Mapping[str, Any] | None
    strict: bool | None


def offered(functions: Iterable[Offered], settings: Settings) -> Tools:
    """Return tools as templates read them.

    Args:
        functions: the tools.
        settings: how many, and how large.

    Raises:
        ApiError: too many, too large, or two of one name.
    """
    found: dict[str, Mapping[str, Any]] = {}
    given = list(functions)
    within("tools", len(given), settings.tools, "tools")
    for one in given:
        parameters = one.parameters or {"type": "object", "properties": {}}
        size = len(json.dumps(parameters)) + len(one.description or "")
        within(one.where, size, settings.schema, "bytes")
        if one.name in found:
            where = f"{one.where}.name"
            raise invalid(f"{where}: there are two of the name {shown(one.name)}", where)
        described = {} if one.description is None else {"description": one.description}
        strict = {} if one.strict is None else {"strict": one.strict}
        found[one.name] = {
            "type": "function",
            "function": {"name": one.name, **described, "parameters": parameters, **strict},
        }
    return tuple(found.values())


def chosen(mode: str, names: Sequence[str] | None, tools: Tools) -> tuple[str, Tools]:
    """Return "auto", "none", "required" or the name of a tool, and the tools that may be called.

    Args:
        mode: "auto", "none", "required", or "named" for the one of `names`.
        names: those that may be called; None for all.
        tools: that are offered.

    Raises:
        ApiError: a tool that is not offered, or none where one has to be called.
    """
    known = [tool["function"]["name"] for tool in tools]
    for name in names or ():
        if name not in known:
            raise invalid(f"tool_choice: there is no tool {shown(name)}", "tool_choice")
    if mode == "required" and not tools:
        raise invalid("tool_choice: there are no tools to call", "tool_choice")
    if mode == "none":
        return mode, ()
    if mode == "named" and names is not None and names[0] not in MODES:
        return names[0], tools
    if names is not None:
        tools = tuple(tool for tool in tools if tool["function"]["name"] in names)
    # One that is called like a mode is the only one that there is.
    return ("required" if mode == "named" else mode), tools
