"""A conversation: its messages, taken back, written to a file and read from one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quintet.errors import InputError, ModelNotFoundError
from quintet.files import read_json, write_text

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(slots=True)
class Conversation:
    """Messages in turns, and the system message with which it begins anew."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.messages:
            self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def begin_with(self, system: str) -> None:
        """Put a system message at the beginning, in place of the one there is."""
        self.system = system or None
        rest = [message for message in self.messages if message["role"] != "system"]
        self.reset()
        self.messages += rest

    def with_question(self, text: str) -> list[Message]:
        """Return the messages with a further one of the user, for the model."""
        # What the model thought about earlier answers is not part of them.
        plain = [{k: m[k] for k in ("role", "content")} for m in self.messages]
        return [*plain, {"role": "user", "content": text}]

    def add(self, text: str, answer: str, reasoning: str = "") -> None:
        """Keep a question and its answer."""
        answered = {"role": "assistant", "content": answer}
        if reasoning:
            answered["reasoning_content"] = reasoning
        self.messages += [{"role": "user", "content": text}, answered]

    def undo(self) -> str | None:
        """Remove and return the last question with its answer, or None."""
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            return None
        text = self.messages[questions[-1]]["content"]
        del self.messages[questions[-1] :]
        return text

    def save(self, path: Path, **about: Any) -> None:
        """Write the conversation as JSON, with further facts about it.

        Raises:
            SaveError: it could not be written.
        """
        content = {**about, "messages": self.messages}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a conversation that was saved.

        Raises:
            ModelNotFoundError: there is no such file.
            CheckpointError: it is not JSON.
            InputError: it is no conversation.
        """
        if not path.is_file():
            raise ModelNotFoundError(f"there is no file {str(path)!r}")
        messages = read_json(path).get("messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InputError(
                f"{path} holds no conversation: it needs messages, each with a role of "
                f"{', '.join(ROLES)} and a text as content"
            )
        first = messages[0] if messages else {}
        system = first["content"] if first.get("role") == "system" else None
        return cls(system, messages)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.get("role") in ROLES
        and all(isinstance(value.get(key, ""), str) for key in ("content", "reasoning_content"))
        and "content" in value
    )
