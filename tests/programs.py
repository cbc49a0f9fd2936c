"""Programs of Python as forks of a process that has imported torch and this library already.

What reads its settings from the environment once, such as the hub's client, is not imported there,
so that each program finds its own.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Programs"]

# Reads a line of JSON for each program, and writes what came of it.
SERVER = f"""
import functools, json, os, runpy, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from forks import in_a_fork
import torch, quintet.auto, quintet.pipelines, quintet.cli.main, quintet.models.deepseek_v3
assert "huggingface_hub" not in sys.modules

def program(arguments, environment):
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *rest = arguments
    sys.path.insert(0, "")
    if kind == "-c":
        sys.argv = [kind, *rest]
        exec(compile(what, "<string>", "exec"), {{"__name__": "__main__"}})
    else:
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)

for line in sys.stdin:
    arguments, environment, folder = json.loads(line)
    done = in_a_fork(functools.partial(program, arguments, environment), folder)
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
"""


class Programs:
    """The process that forks; a context."""

    def __enter__(self) -> "Programs":
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(
        self, arguments: list[str], environment: Mapping[str, str], folder: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `python -c CODE` or `python -m MODULE` with nothing to read, to its end."""
        assert self._server.stdin
        assert self._server.stdout
        asked = [arguments, dict(environment), str(folder or Path.cwd())]
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(self._server.stdout.readline()))
