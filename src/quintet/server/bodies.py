"""The body of a request: bounded before it is read, JSON without what JSON does not have."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from quintet.server.connection import ClientGoneError
from quintet.server.failures import ApiError, invalid, of_validation
from quintet.server.settings import Settings

__all__ = ["documented", "parsed", "read_json", "read_model"]

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """Return the JSON object that a request holds.

    Raises:
        ApiError: another content type, too much, too slow, not JSON, or not an object.
        ClientGoneError: the client went away before all was there.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            "the body has to be JSON, with the header Content-Type: application/json",
            code="unsupported_media_type",
        )
    return parsed(await _read(request, settings), settings.depth)


async def read_model(request: Request, settings: Settings, model: type[Model]) -> Model:
    """Return the body of a request, checked.

    Raises:
        ApiError: no body that can be used, with the field that is to blame.
        ClientGoneError: the client went away before all was there.
    """
    body = await read_json(request, settings)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise of_validation(error) from None


def parsed(data: bytes, depth: int) -> dict[str, Any]:
    """Return the object that a text of JSON writes.

    The last of keys that are alike counts.

    Raises:
        ApiError: anything else than that.
    """
    if not data.strip():
        raise invalid("the body is empty; send a JSON object", code="invalid_json")
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        # It names the place and not what stands there.
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body has to be a JSON object", code="invalid_json")
    if data.count(b"[") + data.count(b"{") > depth and _deeper(value, depth):
        raise invalid(f"the body nests deeper than {depth}", code="invalid_json")
    return value


def _deeper(value: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


async def _read(request: Request, settings: Settings) -> bytes:
    said = request.headers.get("content-length")
    if said is not None and (not said.isdigit() or int(said[:20]) > settings.body):
        raise _too_large(settings)
    data = bytearray()
    try:
        async with asyncio.timeout(settings.body_time):
            async for chunk in request.stream():
                data += chunk
                if len(data) > settings.body:
                    raise _too_large(settings)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body was not there within {settings.body_time:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(data)


def _too_large(settings: Settings) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {settings.body:,} bytes",
        code="request_too_large",
        # What is not read yet is no next request.
        headers={"Connection": "close"},
    )


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """Return what describes a body in OpenAPI, for a route's `openapi_extra`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        # Put where the references lead when the whole is described.
        "x-parts": parts,
    }
