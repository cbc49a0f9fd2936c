"""What a model wrote, told apart while it arrives: reasoning, content, calls of tools."""

from quintet.parsing.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    OutputParser,
    Reasoning,
)

__all__ = [
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Event",
    "OutputParser",
    "Reasoning",
]
