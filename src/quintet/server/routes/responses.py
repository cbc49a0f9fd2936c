"""`POST /v1/responses`: stateless, at once or as events."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.server.asking import ask
from quintet.server.bodies import documented, received
from quintet.server.connection import until_gone
from quintet.server.events import EventStream, ServerEvent
from quintet.server.logs import error_of_request
from quintet.server.protocol.common import warnings_header
from quintet.server.protocol.response_events import ResponseWriter
from quintet.server.protocol.responses import ResponsesRequest
from quintet.server.questions import AnswerEvent
from quintet.server.replies import begun, json_reply
from quintet.server.score_budget import ScoreBudget
from quintet.server.service import caller_of, request_id_of, service_of
from quintet.server.writing import finished, named, written

router = APIRouter(tags=["openai"])


@router.post("/v1/responses", openapi_extra=documented(ResponsesRequest))
async def create(request: Request) -> Response:
    """Respond to a conversation with thoughts, text and calls of tools."""
    service = service_of(request)
    settings = service.settings
    body, warnings = await received(request, ResponsesRequest)
    served = await service.registry.get(body.model)
    question = body.ask(settings, served.engine.model.config.vocab_size, caller_of(request))
    scores = question.scores(served.context)
    answer_events = ask(served, question)
    writer = ResponseWriter(body.response())
    if body.stream:
        # Of a stream as well, whose last event has all of it once more; here while there is time
        # for an answer of its own.
        service.scores.check(scores, "top_logprobs")
        start = await begun(request, answer_events)
        events = _events(answer_events, writer, request_id_of(request), service.scores, scores)
        stream = EventStream(events, settings)
        stream.headers.update(warnings_header([*warnings, *body.warnings(), *start.warnings]))
        return stream
    with service.scores.taken(scores, "top_logprobs"):
        start = await begun(request, answer_events)
        await until_gone(request, finished(answer_events, writer))
    headers = warnings_header([*warnings, *body.warnings(), *start.warnings])
    return json_reply(writer.response, headers)


async def _events(
    answer_events: AsyncGenerator[AnswerEvent, None],
    writer: ResponseWriter,
    request_id: str,
    budget: ScoreBudget,
    scores: int,
) -> AsyncGenerator[ServerEvent, None]:
    """Yield a response as it is written; a failure is its last event, too."""
    try:
        with budget.taken(scores, "top_logprobs"):
            async with aclosing(written(answer_events, writer)) as events:
                async for event in events:
                    yield event
    except Exception as error:
        api_error = error_of_request(error, request_id)
        for failure in writer.fail({"code": "server_error", "message": api_error.message}):
            yield named(failure)
    finally:
        await answer_events.aclose()
