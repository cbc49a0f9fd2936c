"""Programs as processes of their own: forks of one that has imported what takes long.

As with `subprocess`, nothing that the tests did is known there, and variables that a library reads
once are read anew by all that is imported after the fork.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHATS", "MODELS", "Forks"]

# What the one process imports first, for most models and for chats.
MODELS = """
import sys
import torch
from quintet import *
import quintet.cli.main, quintet.modeling.loading
# What reads its variables once is imported after the fork.
assert 'huggingface_hub' not in sys.modules
"""
CHATS = """
import quintet.auto, quintet.cli.main, quintet.cli.streaming, quintet.cli.chat
import quintet.models.deepseek_v3, quintet.models.qwen2, quintet.quantization.request
from quintet.kernels.native import native
native()
"""
# Reads a line of JSON for each fork to start or to wait for, and writes its number or its code.
SERVER = """
import json, os, sys, traceback

def run(code, arguments, files, cwd, environment):
    os.setsid()
    # The first terminal that is opened is the one whose Ctrl-C is heard.
    for descriptor, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    ended = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        ended = 0
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(ended)

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
    """The process that forks.

    Args:
        imports: what it does first.
    """

    def __init__(self, imports: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", imports + SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        code: str,
        arguments: Sequence[object],
        files: Sequence[str | Path],
        environment: Mapping[str, str],
        cwd: Path | None = None,
    ) -> int:
        """Start a program with its three files, or a terminal thrice, and return its process."""
        asked = {"code": code, "arguments": [*map(str, arguments)], "files": [*map(str, files)]}
        return self._ask({**asked, "cwd": str(cwd or Path.cwd()), "environment": {**environment}})

    def wait(self, process: int) -> int:
        """Return the exit code of a process that has ended, or will."""
        return self._ask(process)

    def run(
        self, code: str, *arguments: object, environment: Mapping[str, str], given: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end, with something to read."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("in", "out", "err")]
            files[0].write_text(given, encoding="utf-8")
            ended = self.wait(self.start(code, arguments, files, environment))
            texts = [path.read_text(encoding="utf-8") for path in files[1:]]
        return subprocess.CompletedProcess([], ended, *texts)

    def close(self) -> None:
        """End it."""
        self._server.communicate()

    def _ask(self, what: Any) -> int:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())
