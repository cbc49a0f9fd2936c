"""What a server says about itself: a line for each thing, and nothing that anybody sent."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from quintet.server import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Put the handlers of the process back, and where warnings go."""
    names = (*logs.OTHERS, logs.LOG.name)
    before = {
        name: (log.handlers[:], log.propagate, log.level)
        for name in names
        for log in [logging.getLogger(name)]
    }
    yield
    logging.captureWarnings(False)
    for name, (handlers, propagate, level) in before.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def failed() -> Exception:
    try:
        raise KeyError("SECRET")
    except KeyError as error:
        return error


def everything() -> None:
    logs.logged("GET /health", {"status": 200, "seconds": 0.00123456})
    logs.report(failed(), "req_1")
    logging.getLogger("uvicorn.error").error("Exception in it\nSECRET", exc_info=failed())
    logging.getLogger("asyncio").error("Task exception\nfuture: SECRET")
    logging.getLogger("uvicorn.error").info("not worth a line")


@pytest.mark.parametrize(("form", "stream"), [("auto", io.StringIO()), ("json", Terminal())])
def test_programs_read_json(form: logs.LogFormat, stream: io.StringIO) -> None:
    assert logs.set_up(form, stream)
    everything()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["what"] for line in lines] == [
        "GET /health",
        "failed",
        "Exception in it",
        "Task exception",
    ]
    assert lines[0]["status"] == 200
    assert lines[1]["error"] == lines[2]["error"] == "KeyError"
    assert lines[1]["at"][-1].startswith("test_logs.py:")
    assert "SECRET" not in stream.getvalue()


@pytest.mark.parametrize(("form", "stream"), [("auto", Terminal()), ("text", io.StringIO())])
def test_people_read_text(form: logs.LogFormat, stream: io.StringIO) -> None:
    assert not logs.set_up(form, stream)
    everything()
    first, second, *_ = lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert first.endswith("GET /health status=200 seconds=0.00123")
    assert "error: failed request_id=req_1 error=KeyError at=" in second
    assert "SECRET" not in stream.getvalue()


def test_warnings_are_lines_too() -> None:
    stream = io.StringIO()
    logs.set_up("json", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("mind the gap", stacklevel=1)
    assert "mind the gap" in json.loads(stream.getvalue())["what"]
