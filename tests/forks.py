"""What would be a process of its own, as a fork of this one, which has imported everything."""

import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["in_a_fork"]


def in_a_fork(
    run: Callable[[], object], where: Path, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run a function as a program: in a folder, with something to read, and an exit code."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("in", "out", "err")]
        paths[0].write_text(given, encoding="utf-8")
        child = os.fork()
        if not child:
            _child(run, where, paths)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [path.read_text(encoding="utf-8") for path in paths[1:]]
    return subprocess.CompletedProcess([], code, *texts)


def _child(run: Callable[[], object], where: Path, paths: list[Path]) -> None:
    code = 1
    try:
        for number, path in enumerate(paths):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        warnings.resetwarnings()
        os.chdir(where)
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
