"""JSON schemas of typed Python functions, for chat templates."""

import inspect
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quintet.errors import InputError

_SIMPLE: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function with type hints and a Google docstring as a JSON schema.

    Raises:
        InputError: it has no docstring, or a parameter without a type or a description.
    """
    name = function.__name__
    summary, described, returns = _parse_docstring(inspect.getdoc(function) or "")
    if not summary:
        raise InputError(f"the tool {name} has no docstring, which is what a model reads of it")
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(f"the tool {name} takes *{parameter.name}; name its parameters")
        if parameter.name not in hints:
            raise InputError(f"the tool {name} has no type for its parameter {parameter.name!r}")
        if parameter.name not in described:
            raise InputError(
                f"the tool {name} does not describe {parameter.name!r} in its docstring's Args"
            )
        schema = _type_schema(hints[parameter.name], f"{name}({parameter.name})")
        properties[parameter.name] = {**schema, "description": described[parameter.name]}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    described_function = {"name": name, "description": summary, "parameters": parameters}
    if hints.get("return") not in (None, type(None)):
        schema = _type_schema(hints["return"], f"the result of {name}")
        described_function["return"] = {**schema, "description": returns} if returns else schema
    return {"type": "function", "function": described_function}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin in (Union, types.UnionType):
        schemas = [_type_schema(option, where) for option in args if option is not type(None)]
        if len(schemas) == 1:
            schema = schemas[0]
        elif all(set(one) == {"type"} and isinstance(one["type"], str) for one in schemas):
            schema = {"type": sorted(one["type"] for one in schemas)}
        else:
            schema = {"anyOf": schemas}
        return {**schema, "nullable": True} if type(None) in args else schema
    if origin is Literal:
        kinds = sorted({_type_schema(type(choice), where)["type"] for choice in args})
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _type_schema(args[0], where)}
    if origin is tuple and Ellipsis not in args:
        return {"type": "array", "prefixItems": [_type_schema(item, where) for item in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(args[1], where)}
    raise InputError(
        f"{where} has the type {hint!r}, which has no JSON schema here; use str, int, float, "
        "bool, list, dict, Literal, Optional or Union, or pass the schema as a dict"
    )


def _parse_docstring(text: str) -> tuple[str, dict[str, str], str]:
    """Return the descriptions of function, parameters and result."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.splitlines():
        if match := _SECTION.match(line):
            current = match[1]
            sections.setdefault(current, [])
        else:
            sections[current].append(line)
    described: dict[str, str] = {}
    for heading in ("Args", "Arguments", "Parameters"):
        lines = sections.get(heading, [])
        indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
        name = ""
        for line in lines:
            match = _ENTRY.match(line.strip())
            if match and len(line) - len(line.lstrip()) == min(indents):
                name = match[1]
                described[name] = match[2].strip()
            elif name and line.strip():
                described[name] = f"{described[name]} {line.strip()}".strip()
    returns = " ".join(
        line.strip() for key in ("Returns", "Return") for line in sections.get(key, [])
    ).strip()
    return "\n".join(sections[""]).strip(), described, re.sub(r"^[\w\[\], |.]+:\s+", "", returns)
