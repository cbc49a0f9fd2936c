"""FSDP2: a model in shards learns, generates and is saved as one that is whole."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_processes_hold_one_model() -> None:
    paths = os.pathsep.join(path for path in (str(HERE.parent), *sys.path) if path)
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded.py")],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
