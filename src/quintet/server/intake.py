"""The outermost layer: request ids, access log, uniform errors."""

import asyncio
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quintet.server.connection import ClientGoneError, SlowReaderError
from quintet.server.failures import ErrorBody, error_response
from quintet.server.logs import error_of_request, logged
from quintet.server.security import share
from quintet.server.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")


class Intake:
    """Handles a request from arrival to end.

    Args:
        app: what answers.
        service: counts what is under way.
        writer_of: tells how errors of a request are written.
    """

    def __init__(
        self, app: ASGIApp, service: Service, writer_of: Callable[[Scope], ErrorBody]
    ) -> None:
        self._app, self._service, self._writer_of = app, service, writer_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, caller="", origin=None, error_code=None)
        status, began = 0, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if state["origin"] is not None:
                    share(headers, state["origin"])
            await send(message)

        self._service.under_way += 1
        try:
            await self._app(scope, receive, sending)
        except ClientGoneError as error:
            status, state["error_code"] = 499, "client_gone"
            if isinstance(error, SlowReaderError):
                state["error_code"] = "slow_reader"
                await _abort(scope)
        except Exception as error:
            api_error = error_of_request(error, request_id)
            if status:
                # Half an answer is all there is; that it ends so must not look like its end.
                await _abort(scope)
            else:
                await error_response(api_error, self._writer_of(scope))(scope, receive, sending)
            status, state["error_code"] = api_error.status, api_error.code
        finally:
            self._service.under_way -= 1
            self._log_request(scope, status, time.monotonic() - began)

    def _log_request(self, scope: Scope, status: int, seconds: float) -> None:
        # Never the path as it came: it may be anybody's text.
        found, state = scope.get("route"), scope["state"]
        route = found.path_format if isinstance(found, Route) else "none"
        facts = {"status": status, "seconds": round(seconds, 4), "request_id": state["request_id"]}
        if state["error_code"] is not None:
            facts["code"] = state["error_code"]
        logged(f"{scope['method'][:16]} {route}", facts)
        for observer in self._service.observers:
            observer.answered(route, scope["method"], status, seconds, state["error_code"])


async def _abort(scope: Scope) -> None:
    """Abort the connection."""
    abort = scope["state"].get("abort")
    if abort is not None:
        abort()
        # The loop tells the server of it before the answer ends.
        await asyncio.sleep(0)
