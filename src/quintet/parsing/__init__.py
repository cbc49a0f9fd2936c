"""Parses model output while it streams: reasoning, content, tool calls."""

from quintet.parsing.choice import opening_of, parser_for
from quintet.parsing.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    OutputParser,
    Reasoning,
)
from quintet.parsing.format import CODER, DEEPSEEK_V3, DEEPSEEK_V31, HERMES, Format, format_of
from quintet.parsing.messages import prepare_messages
from quintet.parsing.tool_prompts import with_tools

__all__ = [
    "CODER",
    "DEEPSEEK_V3",
    "DEEPSEEK_V31",
    "HERMES",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Event",
    "Format",
    "OutputParser",
    "Reasoning",
    "format_of",
    "opening_of",
    "parser_for",
    "prepare_messages",
    "with_tools",
]
