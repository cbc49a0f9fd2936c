"""Renders conversations, and refuses templates that drop content silently."""

import copy
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quintet.errors import ChatTemplateError
from quintet.tokenization.rendered import Rendered

if TYPE_CHECKING:
    from quintet.tokenization.sandbox import CompiledTemplate

Messages = list[dict[str, Any]]


def render_chat(
    template: "CompiledTemplate", variables: Mapping[str, Any], continued: str = ""
) -> Rendered:
    """Render a conversation, in the first form that the template accepts.

    Args:
        template: of the tokenizer or the call, compiled.
        variables: what it sees; among it "messages".
        continued: the field of the last message at whose end to stop, or "" for the whole.

    Raises:
        ChatTemplateError: the template refuses every reading, or leaves a tool call out.
    """
    if continued:
        _text_of(variables["messages"][-1], continued)
    refused: ChatTemplateError | None = None
    for messages in _readings(variables["messages"]):
        seen = {**variables, "messages": messages}
        try:
            whole = template.render(seen, none_is_text=not _has_none(messages))
            _check_calls(template, seen)
            return _continued(template, seen, continued) if continued else whole
        except ChatTemplateError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _readings(messages: Messages) -> Iterator[Messages]:
    """Yield the messages, then variants with other spellings of empty fields."""
    yield messages
    if _has_none(messages):
        required = ("content",)
        yield [{k: v for k, v in one.items() if v is not None or k in required} for one in messages]
        yield [{k: v for k, v in one.items() if v is not None} for one in messages]
        empty = {"content": ""}
        yield [{**empty, **{k: v for k, v in one.items() if v is not None}} for one in messages]
    if any(one.get("content") == "" and one.get("tool_calls") for one in messages):
        yield [
            {**one, "content": None} if one.get("content") == "" and one.get("tool_calls") else one
            for one in messages
        ]


def _has_none(messages: Messages) -> bool:
    return any(value is None for one in messages for value in one.values())


def _check_calls(template: "CompiledTemplate", variables: Mapping[str, Any]) -> None:
    """Refuse a template that ignores tool calls."""
    messages = copy.deepcopy(variables["messages"])
    tags = []
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                tags.append(f"call{secrets.token_hex(8)}")
                function["name"] += tags[-1]
    if not tags:
        return
    text = template.render({**variables, "messages": messages}).text
    if not all(tag in text for tag in tags):
        raise ChatTemplateError(
            "the chat template leaves out tool calls of this conversation; some write none "
            "beside a text: put the 'content' into a message of its own, or pass a chat_template "
            "that shows both"
        )


def _continued(template: "CompiledTemplate", variables: Mapping[str, Any], field: str) -> Rendered:
    """Render up to the end of a field of the last message."""
    messages = copy.deepcopy(variables["messages"])
    holder, key = _text_of(messages[-1], field)
    content: str = holder[key]
    tag = f"end{secrets.token_hex(8)}"
    # The space after the tag tells whether the template takes spaces away.
    holder[key] = f"{content}{tag} "
    text = template.render({**variables, "messages": messages}).text
    place = text.rfind(tag)
    if place >= 0 and text[:place].rstrip().endswith(content.strip()):
        kept_spaces = text.startswith(" ", place + len(tag))
        return Rendered(text[:place] if kept_spaces else text[:place].rstrip(), ())
    # A template that cuts a finished message, such as its thoughts, must not cut this one.
    holder[key] = f"{tag} "
    text = template.render({**variables, "messages": messages}).text
    place = text.rfind(tag)
    if place < 0:
        raise ChatTemplateError(
            "continue_final_message does not work with this chat template: it leaves out or "
            f"rewrites the {field!r} of the last message"
        )
    return Rendered(text[:place] + content, ())


def _text_of(message: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """Return the holder and key of a field's text."""
    value = message.get(field)
    if isinstance(value, str):
        return message, field
    for part in reversed(value if isinstance(value, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return part, "text"
    raise ChatTemplateError(
        f"continue_final_message needs text in the last message's {field!r}, and it has none"
    )
