"""The server's version and load."""

from typing import Any

from fastapi import APIRouter, Request

import quintet
from quintet.server.service import service_of

router = APIRouter(tags=["operation"])


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of Quintet."""
    return {"version": quintet.__version__}


@router.get("/load")
async def load(request: Request) -> dict[str, Any]:
    """Return the numbers of running and waiting requests, in total and per model."""
    service = service_of(request)
    models = {
        name: {
            "running": engine.state.running,
            "waiting": engine.state.waiting,
            "rows": engine.limits.rows,
            "queue": engine.limits.queue,
        }
        for name, engine in service.registry.engines.items()
    }
    return {
        # What balancers for vLLM ask for.
        "server_load": sum(one["running"] + one["waiting"] for one in models.values()),
        "models": models,
    }
