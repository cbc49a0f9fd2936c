"""What a training in stages refuses is told by setting, with what goes."""

from pathlib import Path
from typing import Any

import pytest

from quintet.parallel.world import Degrees
from quintet.training.parallel import ParallelSettings
from quintet.training.settings import SettingError
from quintet.training.staged import check_staged, idle_stages
from trainings import settings

PP2 = Degrees(pp=2)


@pytest.mark.parametrize(
    ("tables", "degrees", "message"),
    [
        ({}, Degrees(pp=2, fsdp=2, ep=2), r"\[parallel\] ep = 2 .*ep = tp = 1"),
        ({"train": {"compile": True}}, PP2, r"\[train\] compile .*take one of the two out"),
        (
            {"balance": {"auxiliary": 0.1, "scope": "sequence"}},
            PP2,
            r'\[balance\] scope .*scope = "global"',
        ),
    ],
    ids=["ep", "compile", "scope"],
)
def test_what_stages_do_not_do_is_refused(
    tables: dict[str, Any], degrees: Degrees, message: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, tmp_path / "run", "qwen2_moe", **tables)
    check_staged(config, Degrees(**{axis: degrees.of(axis) for axis in ("cp", "fsdp", "ep")}))
    with pytest.raises(SettingError, match=message):
        check_staged(config, degrees)


@pytest.mark.parametrize(
    ("train", "degrees", "message"),
    [
        ({}, Degrees(tp=2, cp=2), r"sequence_parallel = true .*cp = 2"),
        ({}, Degrees(tp=2, fsdp=2, ep=4), r"sequence_parallel = true .*ep = 4"),
        ({"recompute": True}, Degrees(tp=2, pp=2), r"sequence_parallel = true .*take recompute"),
    ],
    ids=["cp", "ep", "recompute"],
)
def test_what_slices_of_tokens_do_not_do_is_refused(
    train: dict[str, Any], degrees: Degrees, message: str, tmp_path: Path
) -> None:
    parallel = {"tp": 2, "sequence_parallel": True}
    config = settings(tmp_path, tmp_path / "run", train=train, parallel=parallel)
    check_staged(config, Degrees(tp=2, fsdp=2, ep=2))
    with pytest.raises(SettingError, match=message):
        check_staged(config, degrees)


def test_slices_of_tokens_go_with_tp() -> None:
    with pytest.raises(SettingError, match="give tp, too"):
        ParallelSettings(sequence_parallel=True)


def test_what_stages_do_is_not_refused(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "balance": {"auxiliary": 0.1, "z": 0.1, "scope": "global", "capacity": 1.0},
        "train": {"recompute": True},
        "optimizer": {"kind": "muon", "precision": "bfloat16"},
    }
    config = settings(tmp_path, tmp_path / "run", "qwen2_moe", **tables)
    check_staged(config, Degrees(pp=2, tp=2, fsdp=2, dp=2, ep=2, cp=2))


@pytest.mark.parametrize(
    ("train", "waits"),
    [({}, True), ({"parts": 2}, False), ({"batches": 2}, False), ({"parts": 1}, True)],
    ids=str,
)
def test_stages_that_wait_are_told_of(train: dict[str, Any], waits: bool, tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "run", train=train)
    assert idle_stages(config, Degrees()) is None
    assert ("give [train] parts" in (idle_stages(config, PP2) or "")) is waits
