"""Cases of trainings that are ended, or cannot write, while several processes train."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from quintet.cli.main import main
from quintet.errors import RankFailedError
from quintet.training import TrainingConfig, checkpoints, run, train
from quintet.training.checkpoints import clean_up, saved_checkpoints
from trainings import Heard

# What a save asks of the system.
CALLS = ("fsync", "replace", "mkdir")


def before_calls(act: Callable[[int], None], do: Callable[[], object]) -> int:
    """Do something, call `act` before each call that writes, and return how many these were."""
    count = 0

    def noted(real: Callable[..., object], *, syncs: bool) -> Callable[..., object]:
        def call(*given: object) -> object:
            nonlocal count
            count += 1
            act(count)
            return None if syncs else real(*given)

        return call

    changed = {name: noted(getattr(os, name), syncs=name == "fsync") for name in CALLS}
    with patch.multiple(os, **changed):
        do()
    return count


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def dies_at_each_write(config: TrainingConfig) -> int:
    """Train, and let the process that writes the second checkpoint die before each of its writes.

    It is a copy that dies, so that the training goes on; return how often it did.
    """
    real, deaths = checkpoints.put, 0

    def put(folder: Path, step: int, *others: Any) -> Path:
        nonlocal deaths
        if step != 2:
            return real(folder, step, *others)
        first = folder / "step-00000001"
        before, seen = contents(first), []
        number_of = before_calls(lambda number: None, lambda: real(folder, step, *others))
        whole = contents(folder / "step-00000002")
        for dies in range(1, number_of + 1):
            (folder / "step-00000002").rename(folder / ".removing-x")
            clean_up(folder)

            def die(number: int, dies: int = dies) -> None:
                if number == dies:
                    os._exit(9)

            child = os.fork()
            if not child:
                before_calls(die, lambda: real(folder, step, *others))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 9
            deaths += 1
            there = {one.step for one in saved_checkpoints(folder)}
            assert there in ({1}, {1, 2})
            assert contents(first) == before
            if 2 in there:
                assert contents(folder / "step-00000002") == whole
            else:
                clean_up(folder)
                real(folder, step, *others)
            seen.append(len(there))
        # Before the last call it is in its place.
        assert set(seen) == {1, 2}
        return folder / "step-00000002"

    with patch.object(checkpoints, "put", put):
        train(config)
    return deaths


def cannot_write(config: TrainingConfig) -> tuple[list[int], list[int], list[str]]:
    """Train where the disk is full while the second checkpoint is written.

    Return the steps that were taken, those that were saved, and what was warned of.
    """
    real = checkpoints.put

    def put(
        folder: Path,
        step: int,
        model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        def full(number: int) -> None:
            if number > 3 and step == 2:
                raise OSError(28, "No space left on device")

        made: list[Path] = []
        before_calls(full, lambda: made.append(real(folder, step, model, tensors, state)))
        return made[0]

    heard = Heard()
    with patch.object(checkpoints, "put", put):
        result = train(config, report=heard)
    # Who hears nothing of it knows it, too.
    assert result.path.name == "step-00000003"
    return [*heard.losses], [one.step for one in heard.saves], heard.warnings


def fails_in_a_step(config: TrainingConfig) -> None:
    """Train, and let the second process fail in its third step; the other says who it was."""
    real, taken = run.take, 0

    def take(*given: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 3 and dist.get_rank() == 1:
            raise ValueError("no such number")
        return real(*given)

    with patch.object(run, "take", take):
        try:
            train(config)
        except RankFailedError as failed:
            print(f"of rank {failed.rank}")
            raise


def trains(*arguments: str) -> None:
    """Run `quintet train`."""
    main(["train", *arguments])
