"""The route that Prometheus scrapes."""

from fastapi import APIRouter, Request
from starlette.responses import Response

router = APIRouter(tags=["operation"])


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics in the text formats of Prometheus and OpenMetrics."""
    content, kind = request.app.state.metrics.exposition(request.headers.get("accept", ""))
    return Response(content, media_type=kind)
