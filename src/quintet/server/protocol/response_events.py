"""A response as it is written: the events of `/v1/responses`, each with the next number."""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from quintet.server.protocol.answers import scored
from quintet.server.protocol.ids import new_id
from quintet.server.questions import Finish, Tokens, TokenScore

Wire = dict[str, Any]


@dataclass(slots=True)
class _Item:
    """One item of the output while it is open."""

    place: int
    kind: type[Reasoning] | type[Content] | type[CallStart]
    body: Wire
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Wire] = field(default_factory=list)

    @property
    def where(self) -> Wire:
        return {"item_id": self.body["id"], "output_index": self.place}

    @property
    def part(self) -> Wire:
        return self.where | {"content_index": 0}


class ResponseWriter:
    """Turns a model's events into a Response, and its stream of events.

    Events are returned in the order in which clients' accumulators ask for them: the whole
    Response first, every item added before it grows and done before the next, and one of
    completed, incomplete and failed last.

    Args:
        response: the Response as it begins, without output.
    """

    def __init__(self, response: Wire) -> None:
        self.response = response
        self._open: _Item | None = None
        self._number = 0

    def begin(self) -> list[Wire]:
        """Return the events before anything is written."""
        return [
            self._event("response.created", response=copy.deepcopy(self.response)),
            self._event("response.in_progress", response=copy.deepcopy(self.response)),
        ]

    def write(self, event: Event, scores: Iterable[TokenScore] = ()) -> list[Wire]:
        """Take one thing the model does, with how likely the tokens of its text were."""
        match event:
            case Reasoning(text):
                events, item = self._within(Reasoning)
                item.pieces.append(text)
                return [
                    *events,
                    self._event("response.reasoning_text.delta", **item.part, delta=text),
                ]
            case Content(text):
                events, item = self._within(Content)
                known = scored(scores)
                item.pieces.append(text)
                item.logprobs += known
                delta = self._event(
                    "response.output_text.delta", **item.part, delta=text, logprobs=known
                )
                return [*events, delta]
            case CallStart(_, name):
                return [*self._close("completed"), *self._add(CallStart, name)]
            case CallArguments(_, text):
                item = self._call()
                item.pieces.append(text)
                return [
                    self._event("response.function_call_arguments.delta", **item.where, delta=text)
                ]
            case CallEnd():
                return self._close("completed")

    def finish(self, finish: Finish) -> list[Wire]:
        """Return the last events of an answer that came to its end, by itself or by a limit."""
        cut = finish.reason == "length"
        broken = cut or (self._open is not None and self._open.kind is CallStart)
        events = [] if self.response["output"] or self._open else self._add(Content)
        events += self._close("incomplete" if broken else "completed")
        self.response["usage"] = _usage(finish.usage)
        if cut:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["status"] = "completed"
            self.response["completed_at"] = int(time.time())
        return [*events, self._event(f"response.{self.response['status']}", response=self.response)]

    def fail(self, error: Mapping[str, Any]) -> list[Wire]:
        """Return the last events of an answer that broke off."""
        events = self._close("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = dict(error)
        return [*events, self._event("response.failed", response=self.response)]

    # -- items -------------------------------------------------------------------------------------

    def _within(self, kind: type[Reasoning] | type[Content]) -> tuple[list[Wire], _Item]:
        events: list[Wire] = []
        if self._open is None or self._open.kind is not kind:
            events = [*self._close("completed"), *self._add(kind)]
        assert self._open is not None
        return events, self._open

    def _call(self) -> _Item:
        assert self._open is not None
        assert self._open.kind is CallStart
        return self._open

    def _add(
        self, kind: type[Reasoning] | type[Content] | type[CallStart], name: str = ""
    ) -> list[Wire]:
        if kind is Reasoning:
            body: Wire = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
        elif kind is Content:
            body = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
        else:
            body = {"id": new_id("fc"), "type": "function_call", "call_id": new_id("call")}
            body |= {"name": name, "arguments": ""}
        body["status"] = "in_progress"
        self._open = item = _Item(len(self.response["output"]), kind, body)
        events = [
            self._event(
                "response.output_item.added", output_index=item.place, item=copy.deepcopy(body)
            )
        ]
        if kind is Content:
            part = _output_text("", [])
            events.append(self._event("response.content_part.added", **item.part, part=part))
        return events

    def _close(self, status: str) -> list[Wire]:
        item, self._open = self._open, None
        if item is None:
            return []
        text = "".join(item.pieces)
        events = []
        if item.kind is Reasoning:
            item.body["content"] = [{"type": "reasoning_text", "text": text}]
            events = [self._event("response.reasoning_text.done", **item.part, text=text)]
        elif item.kind is Content:
            part = _output_text(text, item.logprobs)
            item.body["content"] = [part]
            events = [
                self._event(
                    "response.output_text.done", **item.part, text=text, logprobs=item.logprobs
                ),
                self._event("response.content_part.done", **item.part, part=part),
            ]
        else:
            item.body["arguments"] = text
            events = [
                self._event(
                    "response.function_call_arguments.done",
                    **item.where,
                    name=item.body["name"],
                    arguments=text,
                )
            ]
        item.body["status"] = status
        self.response["output"].append(item.body)
        done = self._event("response.output_item.done", output_index=item.place, item=item.body)
        return [*events, done]

    def _event(self, type: str, **fields: Any) -> Wire:
        number, self._number = self._number, self._number + 1
        return {"type": type, "sequence_number": number, **fields}


def _output_text(text: str, logprobs: list[Wire]) -> Wire:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(tokens: Tokens) -> Wire:
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {
            "cached_tokens": tokens.cached,
            "cache_write_tokens": tokens.prompt - tokens.cached,
        },
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.prompt + tokens.completion,
    }
