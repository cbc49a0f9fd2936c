"""Converts past messages with tool calls to a template's form."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from quintet.errors import ChatTemplateError, shown
from quintet.parsing.format import DEEPSEEK_V3, Format, format_of
from quintet.tokenization import PreTrainedTokenizer


def prepare_messages(
    tokenizer: PreTrainedTokenizer, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return messages in the form that the chat template expects.

    Arguments become the JSON text or a mapping, whichever the template writes as JSON; a text
    beside calls becomes a message before them where the template would write only one of both;
    an empty list of calls is left out.

    Raises:
        ChatTemplateError: the arguments of a call are no JSON object.
    """
    if not any("tool_calls" in message for message in messages):
        return [dict(message) for message in messages]
    written = format_of(tokenizer) or DEEPSEEK_V3
    return [
        one
        for index, message in enumerate(messages)
        for one in _split_calls(message, index, written)
    ]


def _split_calls(
    message: Mapping[str, Any], index: int, written: Format
) -> Iterator[dict[str, Any]]:
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    calls = message.get("tool_calls")
    if not calls:
        yield plain
        return
    if plain.get("content") and not written.text_before:
        yield plain
        plain = {**plain, "content": None}
    plain["tool_calls"] = [
        _call(call, f"messages[{index}].tool_calls[{place}]", written.arguments)
        for place, call in enumerate(calls)
    ]
    yield plain


def _call(call: Any, where: str, form: Literal["text", "mapping"]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(
            f"{where} has to be a call such as {{'type': 'function', 'function': {{'name': 'add', "
            "'arguments': '{}'}}"
        )
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else None
    if text is not None or arguments is None:
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ChatTemplateError(
            f"{where}.function.arguments has to be a JSON object, and is "
            f"{shown(function['arguments'])}"
        )
    if form == "text":
        # As it was written: what a model wrote is then read from what is kept.
        arguments = (text or "").strip() or json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
