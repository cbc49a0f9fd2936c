"""Blocks of Anthropic's messages, and their translation into messages of a chat."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from quintet.server.protocol.common import Body
from quintet.server.protocol.kinds import by_type, only

Wire = dict[str, Any]


class TextBlock(Body):
    """A piece of text."""

    IDLE = frozenset({"cache_control", "citations"})

    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """The assistant's thoughts."""

    IDLE = frozenset({"cache_control"})

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Body):
    """Thoughts of an assistant elsewhere, sealed."""

    IDLE = frozenset({"data"})

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    """A call of a tool by the assistant."""

    IDLE = frozenset({"cache_control", "caller"})

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Texts = str | Annotated[list[Annotated[TextBlock, only("a block", "text")]], Field(fail_fast=True)]


class ToolResultBlock(Body):
    """The result of a tool."""

    # Chats have no place for it; what went wrong is in the content.
    IDLE = frozenset({"cache_control", "is_error"})

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("/text")]
    | Annotated[ThinkingBlock, Tag("/thinking")]
    | Annotated[RedactedThinkingBlock, Tag("/redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("/tool_use")]
    | Annotated[ToolResultBlock, Tag("/tool_result")],
    by_type(),
    only("a block", "text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]


class Turn(Body):
    """The blocks of one side in one turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(min_length=1, fail_fast=True)]

    @model_validator(mode="after")
    def _roles_keep_to_their_blocks(self) -> "Turn":
        for block in self.blocks:
            if block.type not in _BLOCKS_OF[self.role]:
                raise ValueError(
                    f"{self.role} cannot say a block of the type {block.type!r}; "
                    f"only {', '.join(_BLOCKS_OF[self.role])}"
                )
        return self

    @property
    def blocks(self) -> Sequence[Block]:
        """The content; text alone is one block."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


_BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


def text_of(texts: str | Sequence[TextBlock]) -> str:
    """Return the text of blocks, each a line of its own."""
    if isinstance(texts, str):
        return texts
    return "\n".join(block.text for block in texts)


def messages_of(turns: Sequence[Turn]) -> list[Wire]:
    """Return the messages of a chat that turns make; results of tools are messages of their own."""
    messages: list[Wire] = []
    for turn in turns:
        if turn.role == "assistant":
            messages.append(_assistant(turn.blocks))
        else:
            messages += _user_messages(turn)
    return messages


def _user_messages(turn: Turn) -> list[Wire]:
    messages: list[Wire] = []
    texts: list[TextBlock] = []

    def flush() -> None:
        if texts:
            messages.append({"role": turn.role, "content": text_of(texts)})
            texts.clear()

    for block in turn.blocks:
        if isinstance(block, ToolResultBlock):
            flush()
            content = text_of(block.content or [])
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            texts.append(block)
    flush()
    return messages


def _assistant(blocks: Sequence[Any]) -> Wire:
    message: Wire = {"role": "assistant", "content": None}
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if texts or not calls:
        message["content"] = "".join(texts)
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input)},
            }
            for call in calls
        ]
    return message
