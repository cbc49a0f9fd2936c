"""`POST /v1/completions`."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from quintet.server.asking import ask
from quintet.server.bodies import documented, received
from quintet.server.connection import until_gone
from quintet.server.events import DONE, EventStream, ServerEvent
from quintet.server.gathering import merged
from quintet.server.protocol.answers import Frame, event, usage_of
from quintet.server.protocol.common import warnings_header
from quintet.server.protocol.completions import CompletionRequest, pieces
from quintet.server.protocol.text_choices import TextChoice, TextPrompt, joined
from quintet.server.questions import AnswerEvent, Tokens
from quintet.server.replies import begun
from quintet.server.service import caller_of, service_of

router = APIRouter(tags=["openai"])
KIND = "text_completion"


@router.post("/v1/completions", openapi_extra=documented(CompletionRequest))
async def create(request: Request) -> Response:
    """Continue one text or several, at once or as a stream."""
    service = service_of(request)
    settings = service.settings
    body, warnings = await received(request, CompletionRequest)
    body.check(settings)
    served = await service.registry.get(body.model)
    served.admit()
    size = served.engine.model.config.vocab_size
    # Before all prompts are read: what is wrong beside them is found at once.
    body.question((0,), "prompt", settings, size, "")
    prompts = await asyncio.to_thread(
        pieces, body, served.tokenizer, settings, served.context, size
    )
    caller = caller_of(request)
    questions = [body.question(one.ids, one.where, settings, size, caller) for one in prompts]
    streams = [ask(served, question) for question in questions]
    frame = Frame("cmpl", served.name, served.fingerprint)
    count = body.n or 1
    width = max(served.engine.limits.rows // count, 1)
    events = merged([_placed(place, one) for place, one in enumerate(streams)], width)
    choices: list[TextChoice] = []
    for piece in prompts:
        prompt = TextPrompt(piece, echo=bool(body.echo), scored=body.logprobs is not None)
        choices += [
            TextChoice(len(choices) + index, prompt, served.tokenizer) for index in range(count)
        ]
    if body.stream:
        start = await begun(request, streams[0])
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        stream = EventStream(_chunks(events, frame, choices, count, counted=counted), settings)
        stream.headers.update(warnings_header([*warnings, *start.warnings]))
        return stream
    with service.scores.taken(sum(one.scores(served.context) for one in questions), "logprobs"):
        start = await begun(request, streams[0])
        reply = await until_gone(request, _whole(events, frame, choices, count))
    return JSONResponse(reply, headers=warnings_header([*warnings, *start.warnings]))


Placed = tuple[int, AnswerEvent]


async def _placed(
    place: int, events: AsyncGenerator[AnswerEvent, None]
) -> AsyncGenerator[Placed, None]:
    """Yield the events of a prompt, with its index among the prompts."""
    async with aclosing(events):
        async for one in events:
            yield place, one


async def _chunks(
    events: AsyncGenerator[Placed, None],
    frame: Frame,
    choices: list[TextChoice],
    count: int,
    *,
    counted: bool,
) -> AsyncGenerator[ServerEvent, None]:
    """Yield texts as a stream."""
    usage = {"usage": None} if counted else {}
    async with aclosing(events):
        async for place, one in events:
            for part in choices[place * count + one.index].feed(one):
                yield event(frame(KIND, [part], **usage))
    if counted:
        yield event(frame(KIND, [], usage=usage_of(_usages_by_prompt(choices, count))))
    yield DONE


async def _whole(
    events: AsyncGenerator[Placed, None], frame: Frame, choices: list[TextChoice], count: int
) -> dict[str, Any]:
    """Return all texts when they are complete."""
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    async with aclosing(events):
        async for place, one in events:
            index = place * count + one.index
            parts[index] += choices[index].feed(one)
    return frame(
        KIND, [joined(own) for own in parts], usage=usage_of(_usages_by_prompt(choices, count))
    )


def _usages_by_prompt(choices: list[TextChoice], count: int) -> list[list[Tokens]]:
    """Return the token usage of the texts, grouped by prompt."""
    usages = [one.usage for one in choices if one.usage is not None]
    return [usages[start : start + count] for start in range(0, len(usages), count)]
