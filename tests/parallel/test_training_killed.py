"""`quintet train` in two processes, one of which is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.cases import training
from parallel.pool import Pool
from quintet.training.metrics import read_metrics
from quintet.training.settings import written
from trainings import material, settings
from waiting import PATIENCE, until

COMMAND = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def workers_of(agent: int) -> list[int]:
    """Return the processes that torchrun started."""
    text = Path(f"/proc/{agent}/task/{agent}/children").read_text()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in text.split()}
    return [pid for pid, command in commands.items() if b"quintet" in command]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_run_whose_process_was_killed_goes_on_to_the_bit(tmp_path: Path, two: Pool) -> None:
    root = material(tmp_path)
    tables = {"train": {"steps": 12}, "report": {"peak_flops": 1e12}}
    whole = settings(root, tmp_path / "whole", "deepseek_v3", **tables)
    saved = {**tables, "checkpoint": {"every": 3}}
    config = settings(root, tmp_path / "run", "deepseek_v3", **saved)
    losses, _ = two.run(training.run, whole)[0]
    (root / "config.toml").write_text(written(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [*COMMAND, "-m", "quintet", "train", str(root / "config.toml")]
    endless = [*start, "--set", "train.steps=100000"]
    with subprocess.Popen(endless, env=environment, stderr=subprocess.PIPE, text=True) as agent:
        try:
            third = tmp_path / "run" / "step-00000003"
            until(lambda: agent.poll() is not None or third.exists())
            assert third.exists(), agent.communicate()[1]
            os.kill(workers_of(agent.pid)[1], signal.SIGKILL)
            _, told = agent.communicate(timeout=PATIENCE)
        finally:
            agent.kill()
    assert agent.returncode
    assert "rank 1" in told
    done = subprocess.run(
        [*start, "--resume"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    # The path is told once, by the first of them.
    assert done.stdout.split() == [str(tmp_path / "run" / "step-00000012")]
    lines = [line for line in read_metrics(tmp_path / "run") if line["event"] == "step"]
    assert {line["step"]: line["loss"] for line in lines} == losses
