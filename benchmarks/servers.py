"""Servers of several projects as processes: how each is started, and how it wants to be asked."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

__all__ = ["KINDS", "Kind", "Server", "free_port", "processor_seconds"]

ROOT = Path(__file__).parents[1]
# Loading a model, and for some compiling what they are made of.
STARTS_WITHIN = 180.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A server of a project, in one way of running it.

    Attributes:
        name: how results call it.
        weights: bf16, BF16 or Q8_0: of the checkpoint, or of the file made of it.
        command: that starts it; {model}, {port}, {rows} and others are filled in.
        environment: beside this process's own.
        body: fields of its requests, with {out} to be filled in; None for those to be left out.
        ready: what it answers once its model is there.
        names: whether it lists its model; else it takes any name.
        usual: whether it is measured where nobody names it.
    """

    name: str
    weights: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    ready: str = "/v1/models"
    names: bool = True
    usual: bool = True

    @property
    def missing(self) -> str | None:
        """What it cannot run without, if that is not here."""
        if self.command[0] == "llama-server" and _llama_server() is None:
            return "llama-server is neither on the path nor named by LLAMA_SERVER"
        needs = ("sse_starlette", "starlette_context") if "llama_cpp.server" in self.command else ()
        gone = [name for name in needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(gone)} not installed" if gone else None


PYTHON = sys.executable
OURS = (
    PYTHON, "-m", "quintet", "serve", "{model}", "--port", "{port}", "--threads", "{threads}",
    "--rows", "{rows}", "--context", "{context}", "--quiet",
)  # fmt: skip
TRANSFORMERS = (
    PYTHON, "-c", "from transformers.cli.transformers import main; main()", "serve", "{model}",
    "--port", "{port}", "--host", "127.0.0.1", "--device", "cpu",
)  # fmt: skip
BLOCK = 32
# Left alone, it takes most of the memory there is.
CONTINUOUS = (
    *TRANSFORMERS, "--continuous-batching", "--cb-block-size", str(BLOCK),
    "--cb-num-blocks", "{blocks}", "--cb-max-batch-tokens", "512",
)  # fmt: skip
LLAMA = (
    "llama-server", "-m", "{model}", "--port", "{port}", "-np", "{rows}", "-c", "{context_of_all}",
    "-t", "{threads}", "-tb", "{threads}", "--no-webui",
)  # fmt: skip
LLAMA_PYTHON = (
    PYTHON, "-m", "llama_cpp.server", "--model", "{model}", "--port", "{port}",
    "--n_ctx", "{context}", "--n_threads", "{threads}", "--n_threads_batch", "{threads}",
    "--interrupt_requests", "false", "--verbose", "false",
)  # fmt: skip
# It takes no field that its schema does not know, and streams whatever it likes to count.
PLAIN_ONLY = {
    "ignore_eos": None,
    "min_tokens": None,
    "stream_options": None,
    "temperature": None,
    "generation_config": '{{"max_new_tokens": {out}, "min_new_tokens": {out}, "do_sample": false}}',
}
THREADS = {"OMP_NUM_THREADS": "{threads}", "MKL_NUM_THREADS": "{threads}"}

KINDS = (
    Kind("quintet bf16", "bf16", OURS),
    Kind("quintet int8", "bf16", (*OURS, "--quantize", "int8")),
    Kind("quintet bf16 reads all", "bf16", (*OURS, "--kept", "0"), usual=False),
    Kind("transformers bf16", "bf16", TRANSFORMERS, THREADS, PLAIN_ONLY, "/health", names=False),
    Kind(
        "transformers bf16 continuous",
        "bf16",
        CONTINUOUS,
        THREADS,
        PLAIN_ONLY,
        "/health",
        names=False,
    ),
    Kind("llama-server BF16", "BF16", LLAMA),
    Kind("llama-server Q8_0", "Q8_0", LLAMA),
    Kind("llama-cpp-python BF16", "BF16", LLAMA_PYTHON, body={"ignore_eos": None}),
)


class Server:
    """A process that serves, from when it answers until it is closed.

    Args:
        kind: which.
        model: the checkpoint or file.
        rows: how many it may answer at once.
        context: how many tokens each of them may have.
        threads: of the CPU.
        log: where it writes what it has to say.
        options: further words of its command.

    Raises:
        RuntimeError: it does not answer.
    """

    def __init__(
        self,
        kind: Kind,
        model: Path,
        *,
        rows: int,
        context: int,
        threads: int,
        log: Path,
        options: Sequence[str] = (),
    ) -> None:
        self.kind, self.port, self.log = kind, free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "model": str(model),
            "port": str(self.port),
            "rows": str(rows),
            "context": str(context),
            "context_of_all": str(rows * context),
            "blocks": str(-(-rows * context // BLOCK)),
            "threads": str(threads),
        }
        words = [word.format(**given) for word in kind.command]
        if words[0] == "llama-server":
            words[0] = _llama_server() or words[0]
        extra = {name: value.format(**given) for name, value in kind.environment.items()}
        source = os.pathsep.join(
            filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
        )
        began = time.monotonic()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*words, *options],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", **extra},
                cwd=ROOT,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.seconds = time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def body(self, out: int) -> dict[str, Any]:
        """Return the fields that its requests have, for answers of so many tokens."""
        return {
            name: value.format(out=out) if isinstance(value, str) else value
            for name, value in self.kind.body.items()
        }

    def memory(self) -> int:
        """Return the bytes of memory that it holds."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def descriptors(self) -> int:
        """Return how many descriptors it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, Any]:
        """Return the status of a GET, and its JSON if it is some."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                content, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            content, status = error.read(), error.code
        try:
            return status, json.loads(content)
        except ValueError:
            return status, None

    def metrics(self) -> dict[str, float]:
        """Return the numbers of /metrics, by their names with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def close(self, within: float = 20.0) -> int | None:
        """End the process, and return its code; None where it had to be killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def _wait(self) -> None:
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"{self.kind.name} ended with {self.process.returncode}: {_tail(self.log)}"
                )
            try:
                status, listed = self.get(self.kind.ready, timeout=5)
            except OSError:
                status, listed = 0, None
            if status == 200 and listed is not None:
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.kind.name} did not answer in {STARTS_WITHIN:.0f} s")


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def processor_seconds(pid: int) -> float:
    """Return what a process has used of the processor so far; 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _llama_server() -> str | None:
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-5:]
    return " | ".join(line.strip()[:200] for line in lines)
