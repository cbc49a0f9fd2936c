"""The models that are served, and their memory."""

from typing import Any

from fastapi import APIRouter, Request

from quintet.server.registry import Listed
from quintet.server.service import service_of

__all__ = ["router"]

router = APIRouter(tags=["models"])


def described(one: Listed) -> dict[str, Any]:
    """Return a model as OpenAI's clients read it."""
    return {
        "id": one.name,
        "object": "model",
        "created": one.created,
        "owned_by": "quintet",
        "max_model_len": one.context,
        "parent": one.parent,
        "loaded": one.loaded,
    }


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Return the models and adapters that requests may name."""
    listed = service_of(request).registry.listed()
    return {"object": "list", "data": [described(one) for one in listed]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Return one of them; 404 for a name that is none."""
    return described(service_of(request).registry.describe(name))


@router.post("/v1/models/{name:path}/unload")
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Free the memory of a model that is idle; the next request that names it brings it back."""
    registry = service_of(request).registry
    await registry.unload(name)
    return described(registry.describe(name))
