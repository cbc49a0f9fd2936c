"""Request bodies: size-limited, strict JSON."""

import asyncio
import gc
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from quintet.errors import shown
from quintet.server.connection import ClientGoneError
from quintet.server.failures import ApiError, invalid, unavailable
from quintet.server.protocol.common import Body, parse, plain
from quintet.server.service import service_of
from quintet.server.settings import Settings

B = TypeVar("B", bound=Body)

# While a body is checked nobody else is answered: so many values take some tenths of a second.
MOST = 50_000

_CHARSET = re.compile(r"charset\s*=\s*\"?([^\"\s;]*)")
# Bytes of a body in which keys that are alike are looked for.
LOOKED_THROUGH = 1 << 20
# So many times what a body may have is read of one that has more.
PATIENCE = 4
# So many bodies of the largest size may be there in part, of all that ask.
TOGETHER = 32


async def received(request: Request, kind: type[B]) -> tuple[B, list[str]]:
    """Return a request's body, and warnings about fields without effect.

    Raises:
        ApiError: another content type, too much, too slow, not JSON, or what `parse` refuses.
        ClientGoneError: the client went away before all was there.
    """
    settings = service_of(request).settings
    data = await _read_json(request, settings)
    body, warnings = parse(kind, parsed(data, settings.depth), strict=settings.strict)
    return body, [*repeated(data), *warnings]


async def _read_json(request: Request, settings: Settings) -> bytes:
    kind, _, more = request.headers.get("content-type", "").lower().partition(";")
    charset = _CHARSET.search(more)
    if kind.strip() != "application/json":
        raise _no_json("the body has to be JSON, with the header Content-Type: application/json")
    if charset is not None and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise _no_json(f"the body has to be UTF-8, and not {shown(charset[1])}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise _no_json(f"the body has to come as it is, and not as {shown(encoding)}")
    return await _read(request, settings)


def _no_json(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def parsed(data: bytes, depth: int) -> dict[str, Any]:
    """Parse a JSON object.

    The last of keys that are alike counts.

    Raises:
        ApiError: anything else than that.
    """
    if not data.strip():
        raise invalid("the body is empty; send a JSON object", code="invalid_json")
    with _uncollected():
        try:
            value = from_json(data, allow_inf_nan=False, cache_strings="none")
        except ValueError as error:
            # It names the place and not what stands there.
            raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise invalid("the body has to be a JSON object", code="invalid_json")
        if data.count(b"[") + data.count(b"{") > depth or data.count(b":") > MOST:
            _check_shape(value, depth)
    return value


def repeated(data: bytes) -> list[str]:
    """Return warnings of keys that stand twice in one object of a body, which is JSON.

    Bodies that no hand has written are not looked through once more.
    """
    found: dict[str, None] = {}

    def note(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            found.update(dict.fromkeys(key for key, count in counts.items() if count > 1))

    if len(data) <= LOOKED_THROUGH:
        json.loads(data, object_pairs_hook=note)
    return [f"{plain(key)} is given more than once, and the last counts" for key in found]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection while a large body is parsed."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _check_shape(value: dict[str, Any], depth: int) -> None:
    """Check nesting depth and number of items.

    Raises:
        ApiError: too deep, or too much.
    """
    level: list[Any] = [value]
    count = 0
    for _ in range(depth):
        count += len(level) + sum(len(one) for one in level if type(one) is dict)
        if count > MOST:
            raise invalid(
                f"the body has more than {MOST:,} objects, lists and fields of objects; send less "
                "at once",
                code="invalid_json",
            )
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if child and type(child) in (dict, list)
        ]
        if not level:
            return
    raise invalid(f"the body nests deeper than {depth}", code="invalid_json")


async def _read(request: Request, settings: Settings) -> bytes:
    data, size = bytearray(), 0
    service = service_of(request)
    try:
        async with asyncio.timeout(settings.body_time):
            async for chunk in request.stream():
                size += len(chunk)
                # Too much is taken, and not kept: who sends it reads no answer before.
                if size <= settings.body:
                    data += chunk
                    service.receiving += len(chunk)
                elif size > PATIENCE * settings.body:
                    break
                if service.receiving > TOGETHER * settings.body:
                    raise unavailable("too much is being sent by all; try again", "too_much_sent")
    except TimeoutError:
        raise ApiError(
            408,
            f"the body was not there within {settings.body_time:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    finally:
        service.receiving -= len(data)
    if size > settings.body:
        raise ApiError(
            413,
            f"the body is larger than {settings.body:,} bytes",
            code="request_too_large",
            # What was not read is no next request.
            headers={"Connection": "close"},
        )
    return bytes(data)


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a body, for `openapi_extra`."""
    # Several bodies have parts of one name that are not alike.
    prefix = f"{model.__name__}."
    schema = model.model_json_schema(ref_template=f"#/components/schemas/{prefix}{{model}}")
    parts = {f"{prefix}{name}": part for name, part in schema.pop("$defs", {}).items()}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        # Put where the references lead when the whole is described.
        "x-parts": parts,
    }
