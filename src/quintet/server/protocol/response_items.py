"""The items of a Response's conversation, and their translation into messages of a chat."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from quintet.server.protocol.common import Body
from quintet.server.protocol.kinds import by_type, only
from quintet.server.protocol.tools import Arguments

Wire = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"] | None


class Text(Body):
    """A piece of text, from the user or the assistant."""

    IDLE = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


class Refusal(Body):
    """The assistant's refusal."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[Text, Tag("/text")] | Annotated[Refusal, Tag("/refusal")],
    by_type(input_text="text", output_text="text", reasoning_text="text", summary_text="text"),
    only("a part", "input_text", "output_text", "text", "refusal"),
]
Content = str | Annotated[list[Part], Field(fail_fast=True)]


class Message(Body):
    """A message from one side."""

    IDLE = frozenset({"phase"})

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status = None


class FunctionCall(Body):
    """A call of a tool by the assistant."""

    IDLE = frozenset({"caller", "namespace", "async"})

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    id: str | None = None
    status: Status = None


class FunctionCallOutput(Body):
    """The result of a tool."""

    IDLE = frozenset({"caller", "namespace", "name"})

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status = None


class ReasoningItem(Body):
    """The assistant's thoughts; clients often return them without their text."""

    IDLE = frozenset({"encrypted_content"})

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[Text], Field(fail_fast=True)] | None = None
    content: Annotated[list[Text], Field(fail_fast=True)] | None = None
    status: Status = None


Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem
InputItem = Annotated[
    Annotated[Message, Tag("/message")]
    | Annotated[FunctionCall, Tag("/function_call")]
    | Annotated[FunctionCallOutput, Tag("/function_call_output")]
    | Annotated[ReasoningItem, Tag("/reasoning")],
    by_type(default="message"),
    only(
        "an item",
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        default="message",
        remedies={"item_reference": "nothing is stored here; send the item itself"},
    ),
]


def messages_of(items: Sequence[Item]) -> list[Wire]:
    """Return the messages of a chat that items make: what an assistant did in a row is one.

    Thoughts come before what is said, and that before calls; an item that would break this order
    begins another message.
    """
    messages: list[Wire] = []
    turn: Wire | None = None

    def assistant(*taken: str) -> Wire:
        nonlocal turn
        if turn is None or any(turn.get(key) for key in taken):
            turn = {"role": "assistant", "content": None}
            messages.append(turn)
        return turn

    for item in items:
        match item:
            case ReasoningItem():
                text = "\n".join(part.text for part in item.content or item.summary or ())
                if text:
                    thinking = assistant("reasoning_content", "content", "tool_calls")
                    thinking["reasoning_content"] = text
            case FunctionCall():
                call = {"name": item.name, "arguments": item.arguments}
                calls = assistant().setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": call})
            case Message(role="assistant"):
                assistant("content", "tool_calls")["content"] = _text(item.content)
            case Message():
                turn = None
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _text(item.content)})
            case FunctionCallOutput():
                turn = None
                content = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    return messages


def _text(content: str | Sequence[Text | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)
