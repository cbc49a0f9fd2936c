"""Whether the server lives, and whether it takes requests; for probes, which have no key."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from quintet.server.service import service_of

router = APIRouter(tags=["operation"])


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """Return 200 if the models answer, or 503 if one has failed for good."""
    if service_of(request).healthy:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "failed"}, 503)


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> JSONResponse:
    """Return 200 if new requests are taken, or 503 while the server ends or has failed."""
    service = service_of(request)
    if service.draining:
        return JSONResponse({"status": "draining"}, 503, {"Retry-After": "1"})
    if not service.healthy:
        return JSONResponse({"status": "failed"}, 503)
    return JSONResponse({"status": "ready"})
