"""A message as it is written: the events of `/v1/messages`."""

import json
from collections.abc import Iterable
from typing import Any

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quintet.server.protocol.ids import new_id
from quintet.server.questions import Finish, Tokens, TokenScore

Wire = dict[str, Any]

PING: Wire = {"type": "ping"}
_EMPTY: dict[type[Event], Wire] = {
    Reasoning: {"type": "thinking", "thinking": "", "signature": ""},
    Content: {"type": "text", "text": ""},
}


class MessageWriter:
    """Turns a model's events into a Message of Anthropic's, and its stream of events.

    Args:
        model: the name it was asked for by.
        prompt: how many tokens the prompt has.
        silent: whether thoughts are left out; their blocks are there, and empty.
    """

    def __init__(self, model: str, prompt: int, *, silent: bool = False) -> None:
        self.message: Wire = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Tokens(prompt, 0, 0, 0)),
        }
        self._silent = silent
        self._kind: type[Event] | None = None
        self._pieces: list[str] = []

    def begin(self) -> list[Wire]:
        """Return the events before anything is written."""
        start = self.message | {"content": [], "usage": dict(self.message["usage"])}
        return [{"type": "message_start", "message": start}, PING]

    def write(self, event: Event, scores: Iterable[TokenScore] = ()) -> list[Wire]:
        """Take one thing the model does; there is no place for how likely its tokens were."""
        match event:
            case Reasoning(text):
                events = self._within(Reasoning)
                if self._silent:
                    return events
                return [*events, self._delta("thinking_delta", "thinking", text)]
            case Content(text):
                return [*self._within(Content), self._delta("text_delta", "text", text)]
            case CallStart(_, name):
                block = {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}}
                return [*self._stop(), *self._start(CallStart, block)]
            case CallArguments(_, text):
                return [self._delta("input_json_delta", "partial_json", text)]
            case CallEnd():
                return self._stop()

    def finish(self, finish: Finish) -> list[Wire]:
        """Return the last events."""
        events = self._stop()
        if not self.message["content"]:
            events = [*self._start(Content, dict(_EMPTY[Content])), *self._stop()]
        usage = _usage(finish.usage)
        ending = {"stop_reason": _STOP_REASONS[finish.reason], "stop_sequence": None}
        if finish.reason == "stop" and finish.stop is not None:
            ending = {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
        self.message |= ending | {"usage": usage}
        delta = {"type": "message_delta", "delta": ending, "usage": usage}
        return [*events, delta, {"type": "message_stop"}]

    # -- blocks ------------------------------------------------------------------------------------

    @property
    def _place(self) -> int:
        return len(self.message["content"]) - 1

    def _within(self, kind: type[Event]) -> list[Wire]:
        if self._kind is kind:
            return []
        return [*self._stop(), *self._start(kind, dict(_EMPTY[kind]))]

    def _start(self, kind: type[Event], block: Wire) -> list[Wire]:
        self._kind = kind
        self.message["content"].append(block)
        start = {"type": "content_block_start", "index": self._place, "content_block": dict(block)}
        return [start]

    def _delta(self, type: str, key: str, text: str) -> Wire:
        self._pieces.append(text)
        delta = {"type": type, key: text}
        return {"type": "content_block_delta", "index": self._place, "delta": delta}

    def _stop(self) -> list[Wire]:
        if self._kind is None:
            return []
        block, text = self.message["content"][-1], "".join(self._pieces)
        if self._kind is Reasoning:
            block["thinking"] = text
        elif self._kind is Content:
            block["text"] = text
        else:
            block["input"] = _arguments(text)
        self._kind, self._pieces = None, []
        return [{"type": "content_block_stop", "index": self._place}]


_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _usage(tokens: Tokens) -> Wire:
    # Here, tokens that were read before are beside the others, not among them.
    return {
        "input_tokens": tokens.prompt - tokens.cached,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": tokens.completion,
        "output_tokens_details": {"thinking_tokens": tokens.reasoning},
    }


def _arguments(text: str) -> Wire:
    # A call that was broken off has arguments that are no JSON; here they have to be an object.
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
