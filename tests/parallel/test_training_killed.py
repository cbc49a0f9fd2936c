"""`quintet train` in two processes, one of which is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from parallel.cases import keeping, training
from parallel.launching import launch
from parallel.pool import Pool
from quintet.training.metrics import read_metrics
from quintet.training.settings import written
from trainings import material, settings
from waiting import PATIENCE, until

COMMAND = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are made by fork")
def test_a_run_whose_process_was_killed_goes_on_to_the_bit(tmp_path: Path, two: Pool) -> None:
    root = material(tmp_path)
    tables = {"train": {"steps": 8}, "report": {"peak_flops": 1e12}}
    whole = settings(root, tmp_path / "whole", "deepseek_v3", **tables)
    saved = {**tables, "checkpoint": {"every": 3}}
    config = settings(root, tmp_path / "run", "deepseek_v3", **saved)
    losses, _ = two.run(training.run, whole)[0]
    (root / "config.toml").write_text(written(config))
    there = tmp_path / "processes"
    there.mkdir()

    def kill() -> None:
        until((tmp_path / "run" / "step-00000003").exists)
        os.kill(int((there / "1.pid").read_text()), signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    endless = [str(root / "config.toml"), "--set", "train.steps=100000"]
    ended = launch(2, keeping.trains, *endless, where=there)
    killer.join()
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    assert "error: rank 1 " in ended[0].err
    # As those start them who have several: torchrun, which finds nothing imported.
    done = subprocess.run(
        [*COMMAND, "-m", "quintet", "train", str(root / "config.toml"), "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    # The path is told once, by the first of them.
    assert done.stdout.split() == [str(tmp_path / "run" / "step-00000008")]
    lines = [line for line in read_metrics(tmp_path / "run") if line["event"] == "step"]
    assert {line["step"]: line["loss"] for line in lines} == losses
