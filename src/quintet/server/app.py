"""The application: routes, gate, and request lifecycle."""

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

import quintet
from quintet.errors import shown
from quintet.server.failures import ApiError, ErrorBody, error_response, invalid
from quintet.server.intake import Intake
from quintet.server.metrics import Metrics
from quintet.server.protocol.messages import error_body
from quintet.server.routes import (
    chat,
    completions,
    embeddings,
    health,
    messages,
    metrics,
    models,
    page,
    responses,
    tokens,
    version,
)
from quintet.server.security import Gate
from quintet.server.service import Service


def routers(service: Service) -> tuple[APIRouter, ...]:
    """Return the routers that the settings enable."""
    routes = (
        health.router,
        version.router,
        metrics.router,
        models.router,
        tokens.router,
        chat.router,
        completions.router,
        responses.router,
        messages.router,
        embeddings.router,
    )
    return (*routes, page.router()) if service.settings.page else routes


def writer_of(scope: Scope) -> ErrorBody:
    """Return the function that writes a request's errors, in Anthropic's shape or in OpenAI's."""
    path = scope["path"]
    is_messages = path in (messages.MESSAGES, messages.COUNTING)
    lists = path.startswith("/v1/models") and "anthropic-version" in Headers(scope=scope)
    return error_body if is_messages or lists else ApiError.body


def create_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(
        title="Quintet",
        version=quintet.__version__,
        openapi_url="/openapi.json" if service.settings.docs else None,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server, app.state.metrics = service, Metrics(service)
    service.observers.append(app.state.metrics)
    for router in routers(service):
        app.include_router(router)

    async def handle_error(request: Request, error: Exception) -> Response:
        api_error = _error_of_framework(error)
        request.state.error_code = api_error.code
        return error_response(api_error, writer_of(request.scope))

    app.add_exception_handler(HTTPException, handle_error)
    app.add_exception_handler(RequestValidationError, handle_error)
    # The last is the outermost.
    app.add_middleware(Gate, service=service)
    app.add_middleware(Intake, service=service, writer_of=writer_of)
    _describe(app)
    return app


def _error_of_framework(error: Exception) -> ApiError:
    """Convert an error of the framework."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        # Of the path or the query: a name.
        name = str(first["loc"][-1])
        return invalid(f"{name}: {first['msg']}, not {shown(first['input'])}", name)
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return ApiError(404, "there is no such route", code="route_not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(
            405,
            f"the route takes {allowed}",
            code="method_not_allowed",
            headers={"Allow": allowed},
        )
    return ApiError(error.status_code, str(error.detail), headers=error.headers or {})


def _describe(app: FastAPI) -> None:
    """Add the schemas of bodies that routes parse themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            for path in schema["paths"].values():
                for operation in path.values():
                    parts.update(operation.pop("x-parts", {}))
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
