"""Command lines at terminals of their own: forks of one process that has imported everything."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Forks"]

# Reads a line of JSON for each fork to start or to wait for, and writes its number or its code.
SERVER = """
import json, os, signal, sys
import quintet.auto, quintet.cli.streaming, quintet.cli.chat, quintet.models.deepseek_v3
import quintet.models.qwen2, quintet.quantization.request
from quintet.cli.main import main
from quintet.kernels.native import native

native()

def run(arguments, tty, cwd, environment):
    os.setsid()
    # The first terminal that is opened is the one whose Ctrl-C is heard.
    opened = os.open(tty, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(opened, descriptor)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.update(environment)
    code = 1
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        os._exit(code)

for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
    else:
        child = os.fork()
        if child == 0:
            run(**asked)
        print(child, flush=True)
"""


class Forks:
    """The process that forks."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, arguments: list[str], tty: str, cwd: Path, environment: Mapping[str, str]
    ) -> int:
        """Start a command line at a terminal, and return its process."""
        asked = {"arguments": arguments, "tty": tty, "cwd": str(cwd)}
        return self._ask({**asked, "environment": dict(environment)})

    def wait(self, process: int) -> int:
        """Return the exit code of a process that has ended, or will."""
        return self._ask(process)

    def close(self) -> None:
        """End it."""
        self._server.communicate()

    def _ask(self, what: Any) -> int:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())
