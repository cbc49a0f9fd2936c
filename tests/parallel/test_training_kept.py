"""What processes train together is not lost, whatever happens to one of them, and goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.cases import keeping, training
from parallel.launching import launch
from parallel.pool import Pool
from quintet import AutoModelForCausalLM
from quintet.training import train
from quintet.training.checkpoints import saved_checkpoints
from trainings import Heard, material, settings

TABLES: dict[str, Any] = {
    "train": {"steps": 3},
    "checkpoint": {"every": 1, "keep": 3},
    "report": {"peak_flops": 1e12},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


def test_a_run_goes_on_in_any_number_of_processes_to_the_same(
    root: Path, tmp_path: Path, two: Pool, four: Pool
) -> None:
    tables = {
        "balance": {"bias": 0.01, "sequence": 0.1},
        "data": {"batch_rows": 4},
        "report": {"peak_flops": 1e12},
        "train": {"steps": 8},
    }
    alone = settings(root, tmp_path / "alone", "deepseek_v3", **tables)
    result = train(alone, report=(heard := Heard()))
    found: dict[int, float] = {}

    def stretch(steps: int, **parallel: Any) -> Any:
        return settings(
            root,
            tmp_path / "parts",
            "deepseek_v3",
            **{**tables, "train": {"steps": steps}, "parallel": parallel},
        )

    found |= two.run(training.run, stretch(2, fsdp=2, ep=2))[0][0]
    found |= four.run(training.run, stretch(3, fsdp=2, tp=2, ep=4), True, seconds=150)[0][0]
    train(stretch(4), resume=True, report=(then := Heard()))
    found |= then.losses
    found |= four.run(training.run, stretch(5, fsdp=2, dp=2, ep=2), True, seconds=150)[0][0]
    found |= two.run(training.run, stretch(6, tp=2), True)[0][0]
    found |= four.run(training.run, stretch(7, pp=2, fsdp=2), True, seconds=150)[0][0]
    found |= two.run(training.run, stretch(8, pp=2), True)[0][0]
    assert found == pytest.approx(heard.losses, rel=1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / result.path.name)
    biases = [
        [b.tolist() for n, b in model.named_buffers() if n.endswith("correction_bias")]
        for model in (again, result.model)
    ]
    assert biases[0] == biases[1]


@pytest.mark.skipif(sys.platform != "linux", reason="a process is copied by fork")
def test_who_dies_at_any_write_of_a_save_leaves_a_checkpoint_or_none(
    root: Path, tmp_path: Path, two: Pool
) -> None:
    # However they divide the model, the one that writes has all of it by then.
    config = settings(root, tmp_path / "run", "qwen2_moe", **TABLES, parallel={"fsdp": 2})
    deaths = two.run(keeping.dies_at_each_write, config)
    assert deaths[0] > 8
    assert deaths[1] == 0
    assert [one.step for one in saved_checkpoints(tmp_path / "run")] == [1, 2, 3]


def test_a_save_that_fails_is_told_and_all_go_on(root: Path, tmp_path: Path, two: Pool) -> None:
    config = settings(root, tmp_path / "run", **TABLES)
    (steps, saves, warned), _ = two.run(keeping.cannot_write, config)
    assert (steps, saves) == ([1, 2, 3], [1, 3])
    (line,) = (line for line in warned if "is not saved" in line)
    assert "step-00000002" in line
    assert "No space left" in line
    assert "The training goes on" in line
    assert [one.step for one in saved_checkpoints(tmp_path / "run")] == [1, 3]


@pytest.mark.parametrize("parallel", [{"fsdp": 2}, {"pp": 2}], ids=["fsdp", "pp"])
def test_who_fails_in_a_step_is_named_and_all_end(
    parallel: dict[str, int], root: Path, tmp_path: Path
) -> None:
    config = settings(root, tmp_path / "run", **TABLES, parallel=parallel)
    ended = launch(2, keeping.fails_in_a_step, config, where=tmp_path)
    assert [one.code for one in ended] == [1, 1]
    assert "ValueError: no such number" in ended[1].err
    lines = [line for one in ended for line in one.err.splitlines() if line.startswith("error: ")]
    (line,) = lines
    assert "rank 1 " in line
    assert "failed: ValueError: no such number" in line
    assert ended[0].out == "of rank 1\n"
    assert [one.step for one in saved_checkpoints(tmp_path / "run")] == [1, 2]
