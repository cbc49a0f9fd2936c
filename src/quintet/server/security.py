"""Access control: host names, origins, API keys."""

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quintet.server.failures import ApiError, invalid, unavailable
from quintet.server.service import Service
from quintet.server.settings import Settings

HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::(?P<port>\d{1,5}))?")
NAMES = re.compile(r"[A-Za-z0-9 ,_-]{0,2000}")
# Probes have no key, and learn nothing from them.
PROBES = frozenset({"/health", "/ready"})
# Who watches learns most when there is too much, and at the end.
WATCHED = frozenset({"/metrics", "/load"})
# A browser sends no key when it goes to a page; the page is the same for everybody.
PAGE = "/"


class Keys:
    """The API keys, stored as digests.

    Args:
        keys: any of them opens it; none, and everybody may ask.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        # Of another salt in every process, as they are compared with nothing else.
        self._salt = secrets.token_bytes(16)
        self._known = tuple(self._digest(key.encode()) for key in keys)

    def __bool__(self) -> bool:
        """Return whether a key is required."""
        return bool(self._known)

    def holder(self, key: bytes) -> str | None:
        """Return a stable name for a key's holder, or None for a wrong key.

        How long it takes does not depend on how much of a key is right, nor on which one it is.
        """
        digest, right = self._digest(key), False
        for known in self._known:
            right |= hmac.compare_digest(digest, known)
        return hashlib.sha256(b"holder:" + key).hexdigest()[:16] if right else None

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._salt).digest()


class Gate:
    """Admits requests that are allowed.

    Args:
        app: what they are for.
        service: says what is allowed, and whether it takes new ones.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = Keys(service.settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it.

        Raises:
            ApiError: it may not ask.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings, headers = self._service.settings, Headers(scope=scope)
        check_path(scope)
        host = check_host(headers, settings)
        origin = check_origin(headers, host, settings)
        if origin is not None:
            # Of errors, too, which are written farther out.
            scope["state"]["origin"] = origin
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
        path = scope["path"]
        if path not in PROBES:
            watched = path in WATCHED
            if self._service.under_way > settings.requests and not watched:
                raise unavailable("too many requests are under way; try again", "too_many_requests")
            if self._keys and not (path == PAGE and settings.page):
                scope["state"]["caller"] = self._caller(headers)
            if self._service.draining and not watched:
                raise unavailable(
                    "the server ends; ask another one, or this one when it is back",
                    "server_shutdown",
                    settings.drain,
                )
        await self._app(scope, receive, send)

    def _caller(self, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        holder = self._keys.holder(key.strip().encode("latin-1", "replace"))
        if holder is None:
            raise ApiError(
                401,
                "the key is wrong or missing; send it as Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return holder


def check_path(scope: Scope) -> None:
    """Refuse ambiguous paths.

    Raises:
        ApiError: no path from the root, or one that hides what it is.
    """
    raw = bytes(scope.get("raw_path") or scope["path"].encode())
    path = scope["path"]
    if not raw.startswith(b"/") or raw.startswith(b"//") or "\\" in path or "\0" in path:
        raise invalid("the path has to begin with one / and to name a route", code="invalid_path")
    if path in PROBES and raw != path.encode():
        raise invalid("the path has to be written without %", code="invalid_path")


def check_host(headers: Headers, settings: Settings) -> str:
    """Return the requested host with port.

    Pages whose name was made to lead to this machine send their own name here.

    Raises:
        ApiError: none, several, no name of a host, or one that is not allowed.
    """
    given = headers.getlist("host")
    found = HOST.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise invalid("the request needs one header Host, NAME or NAME:PORT", code="invalid_host")
    name = found["name"].lower().rstrip(".")
    allowed = {"localhost", settings.host.lower(), *(one.lower() for one in settings.allowed_hosts)}
    if "*" not in allowed and name not in allowed and not _is_address(name):
        raise ApiError(
            403,
            f"the server does not answer as host {name[:80]!r}; it would with --allowed-host NAME",
            "permission_error",
            "host_not_allowed",
        )
    return given[0].lower()


def check_origin(headers: Headers, host: str, settings: Settings) -> str | None:
    """Return the requesting page's origin if it is a foreign one.

    Raises:
        ApiError: its scripts may not ask.
    """
    given = headers.getlist("origin")
    if not given:
        return None
    origin = given[0].lower()
    if len(given) == 1 and origin in (f"http://{host}", f"https://{host}"):
        return None
    allowed = {one.lower().rstrip("/") for one in settings.allowed_origins}
    if len(given) == 1 and ("*" in allowed or origin in allowed):
        return given[0]
    raise ApiError(
        403,
        "pages of this origin may not ask; they could with --allowed-origin ORIGIN",
        "permission_error",
        "origin_not_allowed",
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def share(headers: MutableHeaders, origin: str) -> None:
    """Let the scripts of a page read an answer, by the headers of CORS."""
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after, warnings"
    headers.add_vary_header("Origin")


def _preflight(headers: Headers) -> Response:
    # Clients have headers of their own, as x-stainless-os; none of them opens anything.
    requested = headers.get("access-control-request-headers", "")
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": requested if NAMES.fullmatch(requested) else "",
            "Access-Control-Max-Age": "600",
        },
    )
