"""`POST /v1/embeddings`: what a model makes of texts, as vectors."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.server.bodies import documented, received
from quintet.server.connection import cancelled, until_gone
from quintet.server.protocol.common import warnings_header
from quintet.server.protocol.embeddings import EmbeddingsRequest, embeddings
from quintet.server.protocol.prompts import ids_of, listed, placed
from quintet.server.registry import ServedModel
from quintet.server.replies import json_reply
from quintet.server.service import caller_of, service_of

router = APIRouter(tags=["openai"])
# Where a text stands in the request, and its ids.
Placed = tuple[str, tuple[int, ...]]


@router.post("/v1/embeddings", openapi_extra=documented(EmbeddingsRequest))
async def create(request: Request) -> Response:
    """Return a vector of each text: the last state of its last token, or the mean of all."""
    service = service_of(request)
    settings = service.settings
    body, warnings = await received(request, EmbeddingsRequest)
    given = listed(body.input, "input", settings.prompts)
    served = await service.registry.get(body.model)
    served.admit()
    texts = await asyncio.to_thread(_read, given, served)
    scope = caller_of(request) + (f"\n{body.cache_salt}" if body.cache_salt else "")
    vectors = await until_gone(request, _vectors(body, texts, served, scope, settings.deadline))
    reply = embeddings(body, vectors, sum(len(ids) for _, ids in texts))
    return json_reply(reply, warnings_header(warnings))


def _read(given: list[tuple[str, str | list[Any]]], served: ServedModel) -> list[Placed]:
    size = served.engine.model.config.vocab_size
    found = []
    for where, one in given:
        with placed(where):
            found.append((where, ids_of(one, where, served.tokenizer, served.context, size)))
    return found


async def _vectors(
    body: EmbeddingsRequest,
    texts: list[Placed],
    served: ServedModel,
    scope: str,
    timeout: float,
) -> list[list[float]]:
    """Return the vectors, made for as many texts at once as there are rows; one error ends all."""
    room = asyncio.Semaphore(served.engine.limits.rows)

    async def one(where: str, ids: tuple[int, ...]) -> list[float]:
        async with room:
            with placed(where):
                vector = await served.engine.embed(
                    ids,
                    pooling=body.pooling or "last",
                    normalize=body.normalize is not False,
                    scope=scope,
                    priority=body.priority or 0,
                    timeout=timeout,
                    adapter_name=served.adapter,
                )
        numbers: list[float] = vector.tolist()
        return numbers

    tasks = [asyncio.ensure_future(one(*text)) for text in texts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(*tasks)
