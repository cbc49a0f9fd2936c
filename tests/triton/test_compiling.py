"""Every kernel compiles for the GPUs of the last years, without one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quintet.triton
from on_triton import compiling

pytest.importorskip("triton", reason="Triton is made for Linux")
# Of A100, H100 and B200; what a program may have of shared memory there, in bytes. All cases are
# compiled for the one that has the least; for the others, whose instructions differ, one each of
# every type of inputs.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}


def kernels() -> set[str]:
    """Return the names of the kernels that there are: what `triton.jit` makes, and is launched."""
    trees = [ast.parse(p.read_text()) for p in Path(quintet.triton.__path__[0]).glob("*.py")]
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = (call.args[0] for call in calls if ast.unparse(call.func) == "launch")
    return {name.id for name in names if isinstance(name, ast.Name)} - {"kernel"}


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(compiling.__file__).parents[1]), *sys.path]
    )
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "on_triton.compiling", str(capability)),
            *(() if capability == min(SHARED) else ("--once",)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    made = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {one["kernel"] for one in made} == kernels()
    assert all(one["shared"] <= SHARED[capability] for one in made)
