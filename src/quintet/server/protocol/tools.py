"""Tools that are offered, and which of them are to be called, in no protocol's words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quintet.errors import shown
from quintet.server.failures import invalid
from quintet.server.protocol.common import within
from quintet.server.settings import Settings

__all__ = ["chosen", "offered"]

Tools = tuple[Mapping[str, Any], ...]


def offered(
    functions: Iterable[tuple[str, str, str | None, Mapping[str, Any] | None, bool | None]],
    settings: Settings,
) -> Tools:
    """Return tools as templates read them.

    Args:
        functions: of each its place in the request, name, description, schema of its parameters,
            and whether arguments have to keep to that.
        settings: how many, and how large.

    Raises:
        ApiError: too many, too large, or two of one name.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for count, (where, name, description, schema, strict) in enumerate(functions, 1):
        within("tools", count, settings.tools, "tools")
        parameters = schema or {"type": "object", "properties": {}}
        size = len(json.dumps(parameters)) + len(description or "")
        within(where, size, settings.schema, "bytes")
        if name in found:
            raise invalid(f"{where}: there are two of the name {shown(name)}", where)
        told = {"description": description, "strict": strict}
        given = {key: value for key, value in told.items() if value is not None}
        found[name] = {
            "type": "function",
            "function": {"name": name, "parameters": parameters, **given},
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
    there = [tool["function"]["name"] for tool in tools]
    for name in names or ():
        if name not in there:
            raise invalid(f"tool_choice: there is no tool {shown(name)}", "tool_choice")
    if mode == "required" and not tools:
        raise invalid("tool_choice: there are no tools to call", "tool_choice")
    if mode == "none":
        return mode, ()
    if mode == "named" and names is not None:
        return names[0], tools
    if names is not None:
        tools = tuple(tool for tool in tools if tool["function"]["name"] in names)
    return mode, tools
