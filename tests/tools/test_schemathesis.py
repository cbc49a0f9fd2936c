"""Requests of every shape, made from what a server says of itself: none is a fault of its."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outside import tool
from quintet.server.registry import Loaded, Offer
from quintet.serving import Engine, Limits
from served import Running, serving
from server.talking import CONTEXT, chat_model

tool("schemathesis")

SECONDS = 40
# Most bodies name a model, and most names are none: these get further, and end soon.
HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "tiny"
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(body.get(name)) is int:
                body[name] = min(body[name], 4)
    return body
"""


@pytest.fixture
def server() -> Iterator[Running]:
    model, tokenizer = chat_model()

    def loaded() -> Loaded:
        # Routes may unload it.
        engine = Engine(model, tokenizer, Limits(rows=4, capacity=CONTEXT))
        return Loaded(engine, tokenizer, CONTEXT, "fp_test")

    with serving(Offer("tiny", loaded, loaded=loaded())) as it:
        yield it


def test_no_request_is_a_fault(server: Running, tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"),
        *("--checks", "not_a_server_error", "--continue-on-failure", "--warnings", "off"),
        *("--phases", "fuzzing", "--max-time", str(SECONDS), "--seed", "1", "--workers", "2"),
        *("--request-timeout", "30"),
    ]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=10 * SECONDS,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert server.ask("GET", "/health").status == 200
