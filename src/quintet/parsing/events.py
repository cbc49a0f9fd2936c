"""Events of model output: reasoning, content, tool calls."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of reasoning, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; indices count from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A non-empty piece of a call's arguments; together they are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete."""

    index: int


Event = Reasoning | Content | CallStart | CallArguments | CallEnd


class OutputParser(Protocol):
    """Interface of a parser for one streamed text.

    Attributes:
        broken: how many texts began as a call and are content.
    """

    broken: int

    @property
    def done(self) -> bool:
        """Whether generation should end."""

    def feed(self, text: str, token: int) -> list[Event]:
        """Add a token and its text; return the events that are final.

        What is certain by now is returned, no later than with the token that makes it so.
        """

    def flush(self) -> list[Event]:
        """Return the remaining events at the end."""
