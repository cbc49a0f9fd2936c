"""`quintet serve` as a process: what it says, what it refuses, and how it ends."""

import http.client
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch

from cli.conftest import Run, Start
from conformance.families import FAMILIES
from quintet import demo_model
from quintet.cli import serve
from quintet.cli.options import Opened, devices_of
from quintet.cli.output import size_of
from quintet.cli.serve_banner import announcement
from quintet.cli.serve_options import SIZE
from quintet.ops import device_memory
from quintet.server.registry import ModelRegistry, Offer
from quintet.server.service import Service
from quintet.server.settings import Settings
from quintet.serving import Limits, memory
from quintet.serving.scheduler import RowCost
from served import loaded
from simulated_gpu import cuda_memory
from waiting import PATIENCE, until

CANARY = "canary-in-a-prompt"
KEY = "sk-canary-of-a-key"


class Server:
    """A process that serves, and what it has said so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stderr is not None
        first = process.stderr.readline()
        self.serving: dict[str, Any] = json.loads(first)
        self.host, _, port = str(self.serving["url"]).removeprefix("http://").partition(":")
        self.port = int(port)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            sent = None if body is None else json.dumps(body).encode()
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request(method, path, sent, {**head, **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def loads(self) -> dict[str, int]:
        """Return how much is under way."""
        its: dict[str, int] = json.loads(self.ask("GET", "/load")[2])["models"]["tiny"]
        return its

    @contextmanager
    def stream(self, tokens: int) -> Iterator[http.client.HTTPResponse]:
        """Begin a long answer, and return it when its first token is there."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        body = {
            "model": "tiny",
            "prompt": CANARY,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", json.dumps(body), head)
        answer = connection.getresponse()
        try:
            assert answer.status == 200
            assert answer.readline().startswith(b"data: ")
            yield answer
        finally:
            answer.close()
            connection.close()

    def ended(self) -> tuple[int, str]:
        """Return the code it ends with, and all it said."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out + err


@pytest.fixture
def started(process: Start, tireless_model: Path) -> Callable[..., Server]:
    def start(*arguments: object) -> Server:
        given = (f"tiny={tireless_model}", "--port", 0, "--rows", 3, "--capacity", 20_000)
        return Server(process("serve", *given, *arguments, environment={"QUINTET_API_KEY": KEY}))

    return start


def test_it_drains_and_ends(started: Callable[..., Server]) -> None:
    server = started("--drain", 60)
    assert server.serving["models"][0]["rows"] == 3
    assert server.ask("GET", "/ready")[0] == 200
    with (
        server.stream(600) as one,
        server.stream(600) as two,
        server.stream(600) as three,
        ThreadPoolExecutor(2) as pool,
    ):
        body = {"model": "tiny", "prompt": CANARY, "max_tokens": 200}
        waiting = [pool.submit(server.ask, "POST", "/v1/completions", body) for _ in range(2)]
        until(lambda: server.loads()["waiting"] == 2)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ready")[0] == 503)
        assert server.ask("GET", "/health")[0] == 200
        asked = {"model": "tiny", "prompt": "a"}
        status, headers, body = server.ask("POST", "/v1/completions", asked)
        assert status == 503
        assert int(headers["retry-after"]) > 0
        assert json.loads(body)["error"]["code"] == "server_shutdown"
        for future in waiting:
            status, headers, body = future.result()
            assert (status, "retry-after" in headers) == (503, True)
        for answer in (one, two, three):
            text = answer.read()
            assert text.endswith(b"data: [DONE]\n\n")
            assert b'"length"' in text
    code, said = server.ended()
    assert code == 0
    for secret in (CANARY, KEY):
        assert secret not in said
    lines = [json.loads(line) for line in said.splitlines()]
    assert {"status", "seconds", "request_id"} <= lines[0].keys()


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_told_twice_it_ends_at_once(started: Callable[..., Server], told: signal.Signals) -> None:
    # Longer than is waited for here.
    server = started("--drain", 2 * PATIENCE)
    with server.stream(19_000):
        server.process.send_signal(told)
        until(lambda: server.ask("GET", "/ready")[0] == 503)
        server.process.send_signal(told)
        code, said = server.ended()
    assert code == 128 + told
    assert "Traceback" not in said


def test_a_step_that_does_not_come_back_ends_it(started: Callable[..., Server]) -> None:
    # Less than any step takes, so that one of thousands is seen to.
    server = started("--max-step", 0.0002)
    with server.stream(19_000):
        code, said = server.ended()
    assert code == 1
    assert '"stuck"' in said


# -- what is refused before a model is loaded ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "there is no model to serve"),
        (("demo", "--host", "0.0.0.0"), 2, "--insecure-no-auth"),
        (("demo", "--host", "192.0.2.7", "--insecure-no-auth"), 2, "cannot listen at 192.0.2.7"),
        (("demo", "--api-key-file", "/nowhere"), 2, "cannot read keys"),
        (("demo", "--max-body", "much"), 2, "is no size"),
        (("demo", "--rows", "0"), 2, "not in the range"),
        (("demo", "--model", "a b=c"), 2, "NAME=PATH"),
        (("demo", "--adapter", "here"), 2, "has to be NAME=PATH"),
        (("demo", "--adapter", "other:x=here"), 2, "is of no model here"),
        (("--model", "a=x", "--model", "b=y", "--adapter", "c=z"), 2, "has to say of which model"),
        (("no/such/model/here", "--offline", "--port", "0"), 3, "no/such/model"),
        (("demo", "--speculate", "luck"), 2, "luck"),
    ],
    ids=range(12),
)
def test_what_cannot_be_is_said_on_one_screen(
    quintet: Run, arguments: tuple[str, ...], code: int, said: str
) -> None:
    given = [str(demo_model()) if word == "demo" else word for word in arguments]
    result = quintet("serve", *given)
    assert result.code == code, result.err
    assert said in " ".join(result.err.split())
    assert result.is_one_screen


def test_a_port_in_use_is_said_before_the_model_is_loaded(quintet: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = quintet("serve", demo_model(), "--port", other.getsockname()[1])
    assert result.code == 2
    assert "another --port" in result.err
    assert result.is_one_screen


def test_a_model_that_does_not_fit_is_not_loaded(
    quintet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "host_memory", lambda: 10_000_000)
    result = quintet("serve", demo_model(), "--port", 0)
    assert result.code == 5
    assert "fewer --rows" in result.err
    assert result.is_one_screen


def test_memory_without_room_for_a_row_is_told_at_the_start(quintet: Any) -> None:
    """And not by every request, for ever."""
    result = quintet("serve", demo_model(), "--port", 0, "--memory", "100kB")
    assert result.code == 5
    assert "a row of 1,024 tokens takes 1 MiB" in result.err
    assert result.is_one_screen


def test_on_a_gpu_rows_are_found_when_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cost_of", lambda model, nbits: RowCost(0, 1000))
    config = SimpleNamespace(max_position_embeddings=4096)
    model: Any = SimpleNamespace(config=config, device=torch.device("cuda", 0))
    limits, given = Limits(capacity=1000, kept=10**7, queue=3), {"rows": None, "memory": None}
    with cuda_memory(10**8):
        found = serve._measured(model, limits, given, None, "off")
        assert (found.rows, found.memory, found.kept, found.queue) == (64, 7 * 10**7, 10**7, 3)
        assert serve._measured(model, limits, {**given, "rows": 5}, None, "off").rows == 5
        small = {**given, "memory": 9 * 10**6}
        assert serve._measured(model, limits, small, None, "off").rows == 9


def test_devices_are_said_with_what_is_on_them() -> None:
    model = FAMILIES[0].model_of()
    assert devices_of(model) == "cpu"
    model.lm_head.to("meta")
    held = sum(part.nbytes for part in model.parameters() if not part.is_meta)
    assert devices_of(model).startswith(f"cpu ({size_of(held)}), meta (")


def test_a_model_that_cannot_guess_ahead_is_not_told_to(quintet: Run, plain_model: Path) -> None:
    result = quintet("serve", plain_model, "--port", 0, "--speculate", "mtp")
    assert result.code == 2
    assert "needs layers of multi-token prediction" in " ".join(result.err.split())


def test_what_is_not_installed_is_named(quintet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("uvicorn", "no_such_package"))
    result = quintet("serve", demo_model())
    assert result.code == 1
    assert "pip install 'quintet[serve]'" in result.err
    assert "uvicorn" not in result.err


def test_it_says_where_what_and_how_much() -> None:
    loaded_ = loaded(Limits(rows=4, capacity=256))
    offer = Offer("demo", loaded, ("poet",), loaded_)
    opened = Opened("demo", loaded_.engine.model, loaded_.tokenizer, 0.5)
    try:
        for keys, whom in (((), "this machine"), (("sk",), "who has the key")):
            service = Service(Settings(keys=keys), ModelRegistry([offer]))
            lines, facts = announcement(service, ("127.0.0.1", 8000), [opened])
            text = "\n".join(lines)
            for part in ("http://127.0.0.1:8000/v1", whom, "4 rows of 256 tokens", "1,024 tokens"):
                assert part in text
            for part in ("deepseek_v3", "kernels: ", "poet", "a page to chat on"):
                assert part in text
            config = loaded_.engine.model.config
            per_token, per_row = config.cache_numbers()
            json.dumps(facts)
            [model] = facts["models"]
            assert model["bytes"] == 4 * (256 * per_token * 2 + 4 * per_row)
            assert model["tokens"] == 1024
    finally:
        loaded_.engine.close()


def test_sizes_have_a_unit_and_nothing_needs_none() -> None:
    assert [SIZE.convert(text, None, None) for text in ("0", "2KiB", "3MB")] == [0, 2048, 3_000_000]
    with pytest.raises(click.UsageError, match="is no size"):
        SIZE.convert("much", None, None)


def test_variables_are_named_as_options() -> None:
    options = [one for one in serve.command.params if isinstance(one, click.Option)]
    names = [one.envvar for one in options]
    assert len(set(names)) == len(names) > 40
    assert {"QUINTET_PORT", "QUINTET_MAX_BODY", "QUINTET_ROWS", "QUINTET_PAGE"} <= set(names)
    # A key would be seen by others.
    assert not any("api-key" in flag and "file" not in flag for o in options for flag in o.opts)


def test_every_option_has_a_variable(quintet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_HOST", "0.0.0.0")
    result = quintet("serve", demo_model())
    assert (result.code, "'0.0.0.0'" in result.err) == (2, True)
    monkeypatch.setenv("QUINTET_HOST", "127.0.0.1")
    monkeypatch.setenv("QUINTET_MAX_BODY", "much")
    assert "much" in quintet("serve", demo_model()).err
