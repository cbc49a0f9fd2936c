"""The models that are served, and their memory."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request

from quintet.errors import shown
from quintet.server.failures import invalid
from quintet.server.registry import Listed
from quintet.server.service import service_of

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


def described_to_anthropic(one: Listed) -> dict[str, Any]:
    """Return a model as Anthropic's clients read it."""
    created = datetime.fromtimestamp(one.created, UTC)
    return {
        "id": one.name,
        "type": "model",
        "display_name": one.name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": one.context,
        "max_tokens": one.context,
    }


# Anthropic's clients say that they are; the path is the same for both.
Version = Annotated[str | None, Header(alias="anthropic-version", include_in_schema=False)]


@router.get("/v1/models")
async def models(
    request: Request,
    version: Version = None,
    after_id: str | None = None,
    before_id: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    """Return the models and adapters that requests may name, or a page of them."""
    page, more = _page(service_of(request).registry.listed(), after_id, before_id, limit)
    if version is None:
        return {"object": "list", "data": [described(one) for one in page]}
    return {
        "data": [described_to_anthropic(one) for one in page],
        "has_more": more,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def _page(
    listed: Sequence[Listed], after: str | None, before: str | None, limit: int
) -> tuple[Sequence[Listed], bool]:
    """Return so many behind one model, or before another, and whether there are more that way.

    Raises:
        ApiError: there is none of that name.
    """
    names = [one.name for one in listed]
    for param, name in (("after_id", after), ("before_id", before)):
        if name is not None and name not in names:
            raise invalid(f"{param} has to be the id of a model; there is no {shown(name)}", param)
    start = 0 if after is None else names.index(after) + 1
    page = listed[start : None if before is None else names.index(before)]
    backwards = before is not None and after is None
    return page[-limit:] if backwards else page[:limit], len(page) > limit


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str, version: Version = None) -> dict[str, Any]:
    """Return one of them; 404 for a name that is none."""
    one = service_of(request).registry.describe(name)
    return described(one) if version is None else described_to_anthropic(one)


@router.post("/v1/models/{name:path}/unload")
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Free the memory of a model that is idle; the next request that names it brings it back."""
    registry = service_of(request).registry
    await registry.unload(name)
    return described(registry.describe(name))
