"""One request to a server, with the times of its pieces."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

from quintet.errors import ServingError
from quintet.measurement.serving.connection import Address, Reply
from quintet.measurement.serving.workload import Ids, Material, Prompt, Words

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# What the ids of prompts are drawn from are so many words; what a word is in tokens is found by few
# enough to fit into any context.
SAMPLE, TRIAL = 400, 64


@dataclass(slots=True)
class RequestRecord:
    """The timeline of one request, in seconds of one clock.

    Attributes:
        due: when it was to be sent; in an open loop, also if its client was late.
        came: when each piece of text came.
        ended: when it was over.
        status: of HTTP; None if there was no answer.
        error: what went wrong, without anything of the prompt.
        dropped: whether its client hung up.
        prompt: tokens of the prompt, as the server counts them.
        cached: of these, those it had read before.
        completion: tokens of the answer; the number of pieces where the server does not say.
        counted: whether the server said.
        text: the answer.
    """

    due: float
    came: list[float] = field(default_factory=list)
    ended: float = 0.0
    status: int | None = None
    error: str | None = None
    dropped: bool = False
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    counted: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """The server, model and protocol to ask.

    Attributes:
        address: where the server is.
        model: the name it knows its model by.
        endpoint: "completions" or "chat".
        material: what prompts are made of.
        extra: fields of every request; those that are None are left out.
        timeout: how many seconds an answer may take.
    """

    address: Address
    model: str
    endpoint: str = "completions"
    material: Material = field(default_factory=Words)
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    def body(self, prompt: Prompt, out: int) -> dict[str, Any]:
        """Return a streaming, greedy request for exactly `out` tokens."""
        content: Any = {"prompt": prompt}
        if self.endpoint == "chat":
            content = {"messages": [{"role": "user", "content": prompt}]}
        fields = {
            "model": self.model,
            **content,
            "max_tokens": out,
            "min_tokens": out,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def ask(self, prompt: Prompt, out: int) -> RequestRecord:
        """Ask for an answer of `out` tokens and listen to its end."""
        record = RequestRecord(time.perf_counter())
        await self.listen(record, prompt, out)
        return record

    async def listen(
        self, record: RequestRecord, prompt: Prompt, out: int, *, drop: int | None = None
    ) -> None:
        """Send a request and record its course; hang up behind `drop` pieces, or when cancelled."""
        try:
            async with asyncio.timeout(self.timeout):
                async with self.address.ask(PATHS[self.endpoint], self.body(prompt, out)) as reply:
                    await _listen(reply, record, drop)
        except TimeoutError:
            record.error = f"no whole answer in {self.timeout:g} s"
        except asyncio.CancelledError:
            record.dropped = True
            raise
        except (OSError, ServingError) as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            record.ended = time.perf_counter()
            if not record.counted:
                record.completion = len(record.came)

    async def continued(self, answer: RequestRecord) -> Prompt:
        """Return an answer as a part of the next prompt."""
        if isinstance(self.material, Words):
            return answer.text
        return await _ids_of(self.address, self.model, answer.text) or []


async def _listen(reply: Reply, record: RequestRecord, drop: int | None) -> None:
    record.status = reply.status
    if reply.status != 200:
        record.error = _error(reply.status, await reply.read())
        return
    if drop == 0:
        record.dropped = True
        return
    finished = False
    async for data in reply.events():
        now = time.perf_counter()
        if data == "[DONE]":
            return
        event = _object(_parsed(data))
        if "error" in event:
            record.error = f"in the stream: {_object(event['error']).get('code')}"
            return
        if usage := _object(event.get("usage")):
            record.prompt, record.counted = _count(usage.get("prompt_tokens")), True
            record.completion = _count(usage.get("completion_tokens"))
            details = _object(usage.get("prompt_tokens_details"))
            record.cached = _count(details.get("cached_tokens"))
        choices = event.get("choices")
        for choice in map(_object, choices if isinstance(choices, list) else ()):
            finished = finished or choice.get("finish_reason") is not None
            text = _text(choice)
            if text or (finished and not record.came):
                record.came.append(now)
                record.text += text
        if drop is not None and len(record.came) >= drop:
            record.dropped = True
            return
    if not finished:
        record.error = "the stream ended before its end"


def _text(choice: dict[str, Any]) -> str:
    """Return the text of a chunk, reasoning included."""
    if choice.get("delta") is None:
        return str(choice.get("text") or "")
    delta = _object(choice["delta"])
    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return f"{thought}{delta.get('content') or ''}"


def _parsed(data: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ServingError("an event of the stream is not JSON") from None


def _object(value: Any) -> dict[str, Any]:
    """Parse a server's JSON object; empty if it is none."""
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if type(value) is int else 0


def _error(status: int, content: bytes) -> str:
    """Describe a status and the code that stands with it: no texts of users."""
    try:
        error = _object(_object(json.loads(content)).get("error"))
    except (ValueError, RecursionError):
        error = {}
    code = error.get("code") or error.get("type")
    return f"HTTP {status}" if code is None else f"HTTP {status}, {code}"


async def find(
    address: Address,
    *,
    model: str | None = None,
    endpoint: str = "completions",
    prompts: str = "auto",
    extra: dict[str, Any] | None = None,
    timeout: float = 600.0,
) -> Target:
    """Find out the model, prompts and token counts that a server supports.

    Args:
        address: where it is.
        model: the name of its model; by default the first it lists.
        endpoint: "completions" or "chat".
        prompts: "ids", which are exact, "text", or "auto" for ids where the server takes them.
        extra: fields of every request.
        timeout: how many seconds an answer may take.

    Raises:
        ServingError: nobody is there, or nothing is answered.
    """
    dice = random.Random(0)
    sample = Words().draw(SAMPLE, dice)
    try:
        if model is None:
            async with asyncio.timeout(timeout):
                status, listed = await address.fetch("/v1/models")
            try:
                model = str(listed["data"][0]["id"])
            except (TypeError, KeyError, IndexError):
                raise ServingError(
                    f"/v1/models of {address.host}:{address.port} names no model (HTTP {status}); "
                    "give its name, or a key if it wants one"
                ) from None
        words = Target(address, model, endpoint, Words(), extra or {}, timeout)
        if prompts != "text" and endpoint == "completions":
            async with asyncio.timeout(timeout):
                ids = await _ids_of(address, model, str(sample))
            if ids:
                target = Target(address, model, endpoint, Ids(tuple(ids)), extra or {}, timeout)
                trial = await target.ask(target.material.draw(8, dice), 1)
                if trial.error is None or prompts == "ids":
                    return _checked(target, trial)
    except TimeoutError:
        raise ServingError(
            f"{address.host}:{address.port} did not answer within {timeout:g} s"
        ) from None
    except OSError as error:
        raise ServingError(
            f"nobody answers at {address.host}:{address.port}: {error.strerror or error}"
        ) from None
    if prompts == "ids":
        raise ServingError(
            "prompts of ids need /v1/completions and a route that tokenizes, /tokenize or "
            "/extras/tokenize; take prompts of text"
        )
    trial = await words.ask(Words().draw(TRIAL, dice), 1)
    _checked(words, trial)
    per_word = trial.prompt / TRIAL if trial.counted and trial.prompt else 1.0
    return Target(address, model, endpoint, Words(per_word), extra or {}, timeout)


def _checked(target: Target, trial: RequestRecord) -> Target:
    if trial.error is not None:
        raise ServingError(
            f"{target.address.host}:{target.address.port} does not answer a first request of one "
            f"token: {trial.error}"
        )
    return target


async def _ids_of(address: Address, model: str, text: str) -> list[int] | None:
    """Tokenise with the server's own route; None if it has none."""
    for path, name in (
        ("/tokenize", "prompt"),
        ("/tokenize", "content"),
        ("/extras/tokenize", "input"),
    ):
        body = {name: text}
        if name == "prompt":
            body |= {"model": model}
        status, answer = await address.fetch(path, body)
        if status == 200 and isinstance(answer, dict):
            tokens = answer.get("tokens")
            if isinstance(tokens, list) and tokens and all(type(one) is int for one in tokens):
                # The first may be one that only a text begins with.
                return tokens[1:]
    return None
