"""Runs a question on an engine and yields events of its answers.

The protocols are translations to `Ask` and from `AnswerEvent`, and nothing else.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from quintet.errors import ContextLengthError, DeadlineError, GrammarError
from quintet.grammar import GrammarProcessor, unbound
from quintet.parsing import parser_for
from quintet.parsing.events import CallEnd, CallStart, Content, Event, OutputParser, Reasoning
from quintet.server.conversation import Prompt, render
from quintet.server.failures import invalid
from quintet.server.gathering import Gathering
from quintet.server.protocol.prompts import placed
from quintet.server.questions import (
    AnswerEvent,
    Ask,
    Conversation,
    Finish,
    Prompted,
    Start,
    Tokens,
    TokenScore,
)
from quintet.server.registry import ServedModel
from quintet.server.sampling import options_of
from quintet.server.scores import Pending, Spelling
from quintet.serving import Answer

# So long the engine may refuse a question before its asker is told that it was taken.
REFUSAL = 0.1


async def ask(served: ServedModel, question: Ask) -> AsyncGenerator[AnswerEvent, None]:
    """Ask a model and yield events; closing the generator cancels all answers.

    The first is a `Start`; errors before it are those of the question. Then comes a `Prompted`, if
    scores of the prompt were asked for, and of each answer its events and a `Finish`.

    Raises:
        ApiError: as many wait as may, or the prompt leaves no room for an answer.
        ChatTemplateError: the conversation cannot be written down.
        InputError: an option that cannot be used.
        ServingError: the answers were not completed.
    """
    served.admit()
    with placed(question.where):
        prepared = await asyncio.to_thread(_understood, served, question)
    first = asyncio.Event()
    answers = [_answer(prepared, index, first) for index in range(question.n)]
    # No more than there are rows: the others would only wait, and may be too many to.
    gathering = Gathering(answers, served.engine.limits.rows)
    try:
        await gathering.first_item(REFUSAL)
        yield AnswerEvent(0, Start(len(prepared.prompt.ids), prepared.warnings))
        while (event := await gathering.next()) is not None:
            yield event
    finally:
        await gathering.close()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A parsed question, shared by its answers."""

    served: ServedModel
    question: Ask
    prompt: Prompt
    room: int
    shape: GrammarProcessor | None
    deadline: float | None
    warnings: tuple[str, ...]


def _understood(served: ServedModel, question: Ask) -> _Prepared:
    """Parse a question in a worker thread."""
    prompt = question.prompt
    if isinstance(prompt, Conversation):
        read = render(served.tokenizer, prompt, served.context)
    else:
        read = Prompt(prompt, "")
    rest = served.context - len(read.ids)
    if rest < 1:
        raise ContextLengthError(
            f"the model's context is {served.context} tokens and the prompt has {len(read.ids)}, "
            "which leaves none for an answer; shorten it"
        )
    warnings = list(read.warnings)
    wanted = question.max_tokens
    if wanted is not None and wanted > rest:
        warnings.append(f"only {rest} tokens of an answer fit behind the prompt")
    room = min(rest, question.usual_tokens if wanted is None else wanted)
    if question.sampling.min_tokens > room:
        raise invalid(
            f"min_tokens={question.sampling.min_tokens} and an answer has at most {room} tokens; "
            "lower it, or raise the number of tokens",
            "min_tokens",
        )
    if question.n > 1:
        # Where the others go on from what was read for the first.
        stable = (*read.stable, len(read.ids) - 1)
        read = Prompt(read.ids, read.text, tuple(dict.fromkeys(stable)), read.warnings)
    shape = served.shapes.processor(
        question.response_format,
        prompt.tools if isinstance(prompt, Conversation) else (),
        question.tool_choice,
        read.text,
        parallel=question.parallel_tool_calls,
        where=question.form_where,
    )
    if shape is not None and isinstance(prompt, Conversation):
        warnings += [
            f"the schema of the tool {name} is not supported, and its arguments may be any object"
            for name in unbound(prompt.tools)
            if question.tool_choice in ("auto", "required", name)
        ]
    deadline = None if question.timeout is None else time.monotonic() + question.timeout
    return _Prepared(served, question, read, room, shape, deadline, tuple(warnings))


async def _answer(
    prepared: _Prepared, index: int, first: asyncio.Event
) -> AsyncGenerator[AnswerEvent, None]:
    """Yield the events of one answer; only the first reads the prompt."""
    question, served = prepared.question, prepared.served
    if index:
        await first.wait()
    timeout = None
    if prepared.deadline is not None:
        timeout = prepared.deadline - time.monotonic()
        if timeout <= 0:
            raise DeadlineError("the time of the request is over; give it a longer timeout")
    listener = _Listener(prepared, index)
    options: dict[str, Any] = {
        **options_of(question.sampling, served.engine.model, index),
        "max_new_tokens": prepared.room,
        "scope": question.scope,
        "salt": question.salt,
        "priority": question.priority,
        "timeout": timeout,
        "stable": prepared.prompt.stable,
        "stop": question.stop,
        "logprobs": question.logprobs,
        "prompt_logprobs": None if index else question.prompt_logprobs,
        "adapter_name": served.adapter,
    }
    # Each text is followed by a processor of its own.
    shape = None if prepared.shape is None else prepared.shape.copy()
    if shape is not None:
        options["logits_processor"] = [shape]
    answering = aclosing(served.engine.generate(prepared.prompt.ids, **options))
    try:
        with placed(question.where):
            async with answering as answers:
                async for answer in answers:
                    first.set()
                    for event in listener.feed(answer):
                        yield event
                    if listener.over:
                        return
    except GrammarError as error:
        # One that became too complex with what was written.
        raise invalid(f"{question.binding}: {error}", question.binding) from None
    finally:
        # Whoever waits for the first answer need not wait for one that failed.
        first.set()
        if shape is not None:
            served.shapes.figures.masked(shape.masks, shape.seconds)
        listener.count_calls()


class _Listener:
    """Splits one answer into events, with the scores of its tokens."""

    def __init__(self, prepared: _Prepared, index: int) -> None:
        self._prepared, self._index = prepared, index
        question, tokenizer = prepared.question, prepared.served.tokenizer
        self._parser: OutputParser | None = None
        if isinstance(question.prompt, Conversation):
            self._parser = parser_for(
                tokenizer,
                prepared.prompt.text,
                tools=bool(question.prompt.tools),
                parallel=question.parallel_tool_calls,
                written=prepared.served.calls,
            )
        self._scores = None if question.logprobs is None else Pending()
        self._spelling = None
        if question.logprobs is not None or question.prompt_logprobs is not None:
            self._spelling = Spelling(tokenizer)
        self.over = False
        self._count = self._cached = self._reasoned = self._unheard = self._calls = 0

    def feed(self, answer: Answer) -> Iterator[AnswerEvent]:
        """Yield the events of a piece."""
        if answer.usage is not None:
            self._cached = answer.usage.cached
        if answer.prompt_logprobs is not None:
            yield AnswerEvent(self._index, Prompted(), self._of_prompt(answer))
        for place, token in enumerate(answer.ids):
            text = answer.texts[place]
            self._count += 1
            self._unheard += 1
            if self._scores is not None and self._spelling is not None and answer.logprobs:
                self._scores.add(len(text), self._spelling.score(answer.logprobs[place]))
            yield from self._with_scores(self._events(text, token))
            if self.over:
                yield self._finish("stop", answer)
                return
        if answer.finish_reason is not None:
            if self._parser is not None:
                yield from self._with_scores(self._parser.flush())
            self.over = True
            yield self._finish(answer.finish_reason, answer)

    def count_calls(self) -> None:
        """Count the calls that were read, and those that failed in the end."""
        if self._parser is not None:
            figures = self._prepared.served.shapes.figures
            figures.parsed(self._calls, self._parser.broken)

    def _events(self, text: str, token: int) -> list[Event]:
        if self._parser is None:
            return [Content(text)] if text else []
        events = self._parser.feed(text, token)
        self.over = self._parser.done
        return events

    def _with_scores(self, events: list[Event]) -> Iterator[AnswerEvent]:
        for event in events:
            scores: tuple[TokenScore, ...] = ()
            match event:
                case Reasoning(text):
                    self._reasoned += self._unheard
                    scores = self._taken(len(text))
                case Content(text):
                    scores = self._taken(len(text))
                case CallStart():
                    self._taken(0)
                case CallEnd():
                    self._calls += 1
                case _:
                    pass
            self._unheard = 0
            yield AnswerEvent(self._index, event, scores)

    def _taken(self, length: int) -> tuple[TokenScore, ...]:
        if self._scores is None:
            return ()
        # Of what is not told apart, all was heard.
        return self._scores.take(length) if self._parser is not None else self._scores.rest()

    def _of_prompt(self, answer: Answer) -> tuple[TokenScore, ...]:
        assert self._spelling is not None
        ids = self._prepared.prompt.ids
        return tuple(
            self._spelling.first(token) if one is None else self._spelling.score(one)
            for token, one in zip(ids, answer.prompt_logprobs or (), strict=True)
        )

    def _finish(self, reason: str, answer: Answer) -> AnswerEvent:
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        prompt = len(self._prepared.prompt.ids)
        tokens = Tokens(prompt, self._cached, self._count, self._reasoned)
        rest = () if self._scores is None else self._scores.rest()
        return AnswerEvent(self._index, Finish(reason, tokens, answer.stop), rest)
