"""What a model does while it writes: it thinks, it says something, it calls tools."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls have the indices 0, 1, … in the order they begin."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, never empty; all pieces of a call are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete. One that has begun and never ends was broken off."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


class OutputParser(Protocol):
    """Tells apart what a model writes, while it arrives; one for each text."""

    @property
    def done(self) -> bool:
        """Whether generation should end: the model begins what is not its own to write."""

    def feed(self, text: str, token: int) -> list[Event]:
        """Take one token and the text that became certain by it, perhaps none.

        What is certain by now is returned, no later than with the token that makes it so.
        """

    def flush(self) -> list[Event]:
        """Return what was held back, after the last token."""
