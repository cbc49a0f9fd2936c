"""The page to chat on, and the facts it shows of the models."""

import contextlib
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quintet.errors import ChatTemplateError
from quintet.generation.config import GenerationConfig
from quintet.server.conversation import SWITCHES
from quintet.server.page import join
from quintet.server.registry import Listed, Loaded
from quintet.server.service import service_of
from quintet.server.settings import Settings


def router() -> APIRouter:
    """Return the routes of the page, which is joined here and stays in memory."""
    routes = APIRouter(tags=["page"], include_in_schema=False)
    page = join()

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def show() -> Response:
        return Response(page.body, headers=page.headers)

    @routes.get("/page/config")
    async def config(request: Request) -> dict[str, Any]:
        service = service_of(request)
        models = {offer.name: offer.loaded for offer in service.registry.offers}
        return {
            "models": [
                _described(one, models[one.parent or one.name], service.settings)
                for one in service.registry.listed()
            ]
        }

    return routes


def _described(one: Listed, model: Loaded | None, settings: Settings) -> dict[str, Any]:
    """Return the facts of a model that the page shows; only its name if it is not loaded."""
    if model is None:
        return {"id": one.name, "context": one.context, "defaults": {}}
    variables: frozenset[str] = frozenset()
    chats = False
    with contextlib.suppress(ChatTemplateError):
        template = model.tokenizer.get_chat_template()
        variables, chats = model.tokenizer.chat_template_variables(template), True
    return {
        "id": one.name,
        "context": one.context,
        "chat": chats,
        "thinking": not variables.isdisjoint(SWITCHES),
        "defaults": {
            **defaults(model.engine.model.generation_config),
            "max_tokens": min(settings.answer, model.context),
        },
    }


def defaults(config: GenerationConfig) -> dict[str, float | None]:
    """Return the default sampling settings, by the protocol's names."""
    drawn = bool(config.do_sample)
    heat = 1.0 if config.temperature is None else config.temperature
    return {
        "temperature": heat if drawn else 0,
        "top_p": config.top_p if drawn else None,
        "top_k": config.top_k if drawn else None,
        "min_p": config.min_p if drawn else None,
        "repetition_penalty": config.repetition_penalty,
        "presence_penalty": config.presence_penalty,
        "frequency_penalty": config.frequency_penalty,
    }
