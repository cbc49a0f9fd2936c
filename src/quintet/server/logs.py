"""Logging of the server, without anybody's text."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TextIO

from quintet.server.failures import ApiError, error_of, internal

LogFormat = Literal["auto", "text", "json"]
LOG = logging.getLogger("quintet.server")
# Who else speaks while a server runs; uvicorn of requests that are none, asyncio of lost tasks.
OTHERS = ("quintet", "uvicorn.error", "asyncio", "py.warnings")


def set_up(form: LogFormat, stream: TextIO | None = None) -> bool:
    """Configure logging to a stream; return whether it is JSON.

    "auto" is text at a terminal and JSON otherwise.
    """
    stream = stream or sys.stderr
    as_json = form == "json" or (form == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if as_json else _Text())
    for name in OTHERS:
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.propagate = False
        log.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)
    return as_json


def logged(
    message: str, facts: Mapping[str, object] | None = None, level: int = logging.INFO
) -> None:
    """Log a line with facts."""
    LOG.log(level, message, extra={"facts": dict(facts or {})})


def report(error: BaseException, request_id: str) -> None:
    """Log an unexpected error by location, not message.

    Messages of errors may hold what somebody sent.
    """
    logged(
        "failed",
        {"request_id": request_id, "error": type(error).__name__, "at": _places(error)},
        logging.ERROR,
    )


def error_of_request(error: BaseException, request_id: str) -> ApiError:
    """Return the error response of an exception, logging unexpected ones."""
    known = error_of(error)
    if known is None:
        report(error, request_id)
        known = internal(request_id)
    return known


def _places(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    return [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in frames]


class _Formatter(logging.Formatter):
    """Collects a record's fields, without error messages."""

    def fields_of(self, record: logging.LogRecord) -> dict[str, object]:
        facts: dict[str, object] = dict(vars(record).get("facts", {}))
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            facts |= {"error": type(error).__name__, "at": _places(error)}
        return facts


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line of JSON."""
        head = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "what": record.getMessage().splitlines()[0] if record.getMessage() else "",
        }
        return json.dumps(head | self.fields_of(record), ensure_ascii=False, default=str)


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line for people."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        facts = " ".join(
            f"{name}={_short(value)}" for name, value in self.fields_of(record).items()
        )
        first = record.getMessage().splitlines()[0] if record.getMessage() else ""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{clock} {level}{first} {facts}".rstrip()


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
