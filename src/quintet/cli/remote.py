"""A model behind a server that answers: any that speaks OpenAI's protocol."""

import asyncio
import difflib
import json
import os
import socket
import ssl
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from quintet.cli.answer import AnswerPrinter
from quintet.cli.conversation import Message
from quintet.cli.partner import Outcome
from quintet.cli.results import counted
from quintet.cli.terminal import Waiting, harmless
from quintet.errors import InputError, ServingError, shown
from quintet.measurement.serving.connection import Address, Reply
from quintet.parsing.events import Content, Event, Reasoning

# What `generate()` calls otherwise.
NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "max_tokens", "max_completion_tokens", "min_tokens", "stop", "seed"),
    *("logit_bias", "ignore_eos", "stop_token_ids", "reasoning_effort", "chat_template_kwargs"),
    *("response_format", "regex", "grammar", "cache_salt", "priority", "service_tier", "speculate"),
)
# Seconds in which a server says which models it has; answers take as long as they take.
LISTED = 30.0
# As long as a reason may be that is shown.
REASON = 1000
Result = TypeVar("Result")


class Remote:
    """Answers with a model of a server.

    Args:
        url: of the server, with or without `/v1`.
        key: opens it; None for none.
        options: of generate(), or fields of requests; None for what nobody asked for.

    Raises:
        InputError: no address, no such model, or an option that no server has.
        ServingError: there is no server, or it refuses.
    """

    def __init__(self, url: str, key: str | None, options: Mapping[str, Any]) -> None:
        self._url = url
        self._address = Address.of(url, key)
        self._fields: dict[str, Any] = {}
        self._warning, self._warned = "", set[str]()
        given = {name: value for name, value in options.items() if value is not None}
        wanted = given.pop("model", None)
        self.set(given)
        try:
            with Waiting(f"waiting for {url}"):
                self._models = _run(self._list())
        except InputError:
            # Not every server lists its models.
            if wanted is None:
                raise
            self._models = {}
        self._model = next(iter(self._models), "")
        if wanted is not None:
            self.take(str(wanted))
        elif not self._models:
            raise InputError(f"{shown(url)} names no models; name one: model=NAME")

    @property
    def name(self) -> str:
        """The model's."""
        return self._model

    @property
    def context(self) -> int | None:
        """The maximum number of tokens of prompt and answer; None if the server does not say."""
        return self._models.get(self._model)

    def describe(self) -> str:
        """Describe the model and its settings in a line."""
        return f"{self._model} at {self._url}; {self._described()}"

    def answer(self, messages: Sequence[Message], answer: AnswerPrinter) -> Outcome:
        """Answer messages; Ctrl-C hangs up, and the server stops."""
        answer.waiting.text = "waiting for the server"
        answer.begin()
        ended = _run(self._converse([dict(message) for message in messages], answer))
        if ended != "length":
            return Outcome(warning=self.news())
        full = self.context is not None and (answer.prompt or 0) + answer.tokens >= self.context
        cut = (
            "cut: the context is full" if full else f"cut at {counted(answer.tokens)}; -n sets more"
        )
        return Outcome(cut, warning=self.news())

    def news(self) -> str | None:
        """Return the server's remark about the last request, if it is new."""
        warning, self._warning = self._warning, ""
        if not warning or warning in self._warned:
            return None
        self._warned.add(warning)
        return f"the server says: {warning}"

    def complete(
        self, text: str, write: Callable[[str], None]
    ) -> tuple[str | None, dict[str, Any]]:
        """Continue a text, and return the finish reason and the token count."""
        return _run(self._continue(text, write))

    def set(self, given: dict[str, Any]) -> str:
        """Set fields of requests, by their names or generate()'s; None takes one away."""
        given = {NAMES.get(name, name): value for name, value in given.items()}
        wanted = given.pop("model", None)
        if (draws := given.pop("do_sample", None)) is not None:
            if draws:
                raise InputError("do_sample=True: set a temperature above 0, which draws")
            given["temperature"] = 0
        for name in given:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, [*FIELDS, *NAMES], n=1)
                instead = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FIELDS)}"
                raise InputError(f"a server has no option {name!r}; {instead}")
        if wanted is not None:
            self.take(str(wanted))
        fields = {**self._fields, **given}
        self._fields = {name: value for name, value in fields.items() if value is not None}
        return self._described()

    def take(self, model: str) -> str:
        """Have another model of the server answer; "" lists those there are."""
        if not model:
            return "\n".join(
                f"{'*' if name == self._model else ' '} {name}" for name in self._models
            )
        if self._models and model not in self._models:
            near = difflib.get_close_matches(model, self._models, n=1)
            names = ", ".join(list(self._models)[:10])
            instead = f"did you mean {near[0]!r}?" if near else f"there are {names}"
            raise InputError(f"the server has no model {shown(model)}; {instead}")
        self._model = model
        return f"{model} answers from here on"

    # -- asking ---------------------------------------------------------------------------------

    def _described(self) -> str:
        # A schema is no line.
        fields = [
            f"{name}={'{…}' if isinstance(value, dict) else value}"
            for name, value in self._fields.items()
        ]
        return ", ".join(fields) or "as the server chooses"

    def _body(self, **given: Any) -> dict[str, Any]:
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self._model, **given, **streamed, **self._fields}

    async def _list(self) -> dict[str, int | None]:
        """Return the names of the models there are, and their contexts."""
        try:
            async with asyncio.timeout(LISTED), self._ask("/v1/models") as reply:
                body = _object((await reply.read()).decode("utf-8", "replace"))
        except TimeoutError:
            raise ServingError(
                f"{shown(self._url)} has not said within {LISTED:g} s which models it has; look "
                "whether a server is there, and try again when it is ready"
            ) from None
        listed = body.get("data")
        models = listed if isinstance(listed, list) else []
        return {
            harmless(name): _number(model.get("max_model_len"))
            for model in map(_mapping, models)
            if isinstance(name := model.get("id"), str)
        }

    async def _converse(self, messages: list[Message], answer: AnswerPrinter) -> str | None:
        ended = None
        async with self._ask("/v1/chat/completions", self._body(messages=messages)) as reply:
            answer.waiting.text = "reading"
            try:
                async for choice, usage in _choices(reply):
                    if usage:
                        answer.prompt = _number(usage.get("prompt_tokens"))
                        answer.tokens = _number(usage.get("completion_tokens")) or answer.tokens
                    if events := _events(_mapping(choice.get("delta"))):
                        answer.count()
                        answer.feed(events)
                    ended = _reason_of(choice) or ended
            finally:
                answer.end()
        return ended

    async def _continue(
        self, text: str, write: Callable[[str], None]
    ) -> tuple[str | None, dict[str, Any]]:
        ended, used = None, dict[str, Any]()
        async with self._ask("/v1/completions", self._body(prompt=text)) as reply:
            async for choice, usage in _choices(reply):
                used = usage or used
                if piece := choice.get("text"):
                    write(_text(piece))
                ended = _reason_of(choice) or ended
        return ended, used

    @asynccontextmanager
    async def _ask(self, path: str, body: Any = None) -> AsyncIterator[Reply]:
        """Send a request, and return the reply unless it is a refusal."""
        async with AsyncExitStack() as stack:
            # Not around what the answer is used for: its output may fail in the same way.
            with _network(self._url):
                reply = await stack.enter_async_context(self._address.ask(path, body))
                if reply.status != 200:
                    raise _refused(reply, await reply.read(), self._url)
                self._warning = harmless(reply.headers.get("warnings", "")[:REASON])
            yield reply


@contextmanager
def _network(url: str) -> Iterator[None]:
    """Describe a connection error in words.

    Raises:
        ServingError: something does.
    """
    try:
        yield
    except OSError as error:
        raise ServingError(
            f"no server answers at {shown(url)}: {_why(error)}; one begins by `quintet serve MODEL`"
        ) from error


def _why(error: OSError) -> str:
    # What TLS and names of hosts have for numbers are not the system's.
    if error.errno and not isinstance(error, ssl.SSLError | socket.gaierror):
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


async def _choices(reply: Reply) -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the first choice of each chunk, and the usage that it has.

    Raises:
        ServingError: the server failed in the middle, or hung up.
    """
    kind = reply.headers.get("content-type", "text/event-stream")
    if not kind.startswith("text/event-stream"):
        raise ServingError(f"the server answers with {shown(kind)} where a stream was asked for")
    try:
        async for data in reply.events():
            if data == "[DONE]":
                return
            chunk = _object(data)
            if "error" in chunk:
                raise ServingError(f"the server failed: {_reason(chunk)}")
            choices = chunk.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            yield _mapping(first), _mapping(chunk.get("usage"))
    except OSError as error:
        raise ServingError(f"the server hung up: {error}") from error
    raise ServingError("the server hung up before the answer ended")


def _events(delta: Mapping[str, Any]) -> list[Event]:
    """Return the events of a piece; servers have two names for thoughts."""
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    content = delta.get("content")
    events: list[Event] = [Reasoning(_text(thought))] if thought else []
    return [*events, Content(_text(content))] if content else events


def _text(value: Any) -> str:
    # JSON may spell half of a character, which no stream takes.
    return str(value).encode("utf-8", "replace").decode()


def _refused(reply: Reply, body: bytes, url: str) -> Exception:
    reason = _reason(_object(body.decode("utf-8", "replace")))
    if reply.status == 401:
        return ServingError(
            f"{shown(url)} wants another key: {reason}; set QUINTET_API_KEY or --api-key-file"
        )
    if reply.status in (400, 404, 413, 422):
        return InputError(f"the server refuses: {reason}")
    wait = reply.headers.get("retry-after", "")
    later = f"; try again in {wait} s" if wait.isdigit() else ""
    return ServingError(f"the server answers with status {reply.status}: {reason}{later}")


def _reason(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return harmless(str(message or "it gives no reason")[:REASON])


def _object(text: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _reason_of(choice: Mapping[str, Any]) -> str | None:
    reason = choice.get("finish_reason")
    return _text(reason) if isinstance(reason, str) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int else None
