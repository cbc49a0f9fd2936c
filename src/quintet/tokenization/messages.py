"""Validates and copies conversations for templates."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quintet.errors import ChatTemplateError, shown
from quintet.tokenization.tools import function_schema

Message = Mapping[str, Any]

MAX_DEPTH = 64
# A message without content has to say something else.
_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking", "tool_responses")


def plain_messages(conversation: Any, where: str) -> list[dict[str, Any]]:
    """Check and copy the messages of one conversation.

    Raises:
        ChatTemplateError: something is not a message; it names the index and the key.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise ChatTemplateError(
            f"{where} has to be a list of messages such as "
            f"{{'role': 'user', 'content': 'Hi'}}, not {type(conversation).__name__}"
        )
    if not conversation:
        raise ChatTemplateError(f"{where} is empty; a chat needs at least one message")
    return [_plain_message(one, f"{where}[{index}]") for index, one in enumerate(conversation)]


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f"{where} has to be a dict with 'role' and 'content', not {type(message).__name__}"
        )
    given = dict(message)
    role = given.get("role")
    if not isinstance(role, str):
        raise ChatTemplateError(f"{where}['role'] has to be a string, not {shown(role)}")
    if "content" not in given:
        if not any(given.get(key) is not None for key in _INSTEAD_OF_CONTENT):
            raise ChatTemplateError(
                f"{where} has no 'content'; its keys are {', '.join(map(str, message))}"
            )
    elif isinstance(given["content"], Sequence) and not isinstance(given["content"], str):
        for index, part in enumerate(given["content"]):
            if not isinstance(part, Mapping) or "type" not in part:
                raise ChatTemplateError(
                    f"{where}['content'][{index}] has to be a dict such as "
                    "{'type': 'text', 'text': 'Hi'}"
                )
    elif not isinstance(given["content"], str | None):
        raise ChatTemplateError(
            f"{where}['content'] has to be a string or a list of parts, "
            f"not {type(given['content']).__name__}"
        )
    copied: dict[str, Any] = plain(given, where)
    return copied


def plain_tools(tools: Sequence[Mapping[str, Any] | Callable[..., Any]]) -> list[Any]:
    """Return each tool's JSON schema, given schemas or Python functions.

    Raises:
        ChatTemplateError: a tool is neither.
        InputError: a function lacks a type or a docstring.
    """
    if not isinstance(tools, list | tuple):
        raise ChatTemplateError(f"tools has to be a list, not {type(tools).__name__}")
    schemas = []
    for index, tool in enumerate(tools):
        if isinstance(tool, Mapping):
            schemas.append(plain(tool, f"tools[{index}]"))
        elif inspect.isfunction(tool) or inspect.ismethod(tool):
            schemas.append(function_schema(tool))
        else:
            raise ChatTemplateError(
                f"tools[{index}] has to be a JSON schema or a Python function, "
                f"not {type(tool).__name__}"
            )
    return schemas


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copy JSON data, so that templates reach no Python objects.

    Raises:
        ChatTemplateError: there is something else in it, or it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ChatTemplateError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is not kind else value
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ChatTemplateError(f"{where} has the key {shown(key)}, which is not a string")
            copied[str(key)] = plain(item, f"{where}[{shown(key)}]", depth + 1)
        return copied
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ChatTemplateError(
        f"{where} is {type(value).__name__}; a template sees only strings, numbers, lists, dicts"
    )
