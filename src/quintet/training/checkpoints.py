"""The checkpoints of a run: whole folders, or none.

    run/
      config.toml          what the training was told
      step-00000200/       an ordinary checkpoint, with its tokenizer
        training/          what it takes to go on from it to the same bits
          optimizer.safetensors
          state.json

A checkpoint is written into a folder beside its place, and moved there in one step when the disk
has all of it. So whatever happens, each `step-…` is whole, and a run goes on from the last.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quintet.checkpoint import Checkpoint, disk, save
from quintet.errors import CheckpointError, SaveError
from quintet.files import read_json

TRAINING = "training"
STATE = "state.json"
OPTIMIZER = "optimizer"
# What is being written, and what is being removed: neither is a checkpoint.
WRITING, REMOVING = ".writing-", ".removing-"


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A whole checkpoint of a run.

    Attributes:
        path: where it is.
        step: how many steps had been taken.
        state: what it holds beside tensors.
    """

    path: Path
    step: int
    state: Mapping[str, Any]

    @property
    def score(self) -> float | None:
        """The model's score, the lower the better; None if it was not measured."""
        score = self.state.get("score")
        return score if isinstance(score, float) else None


def saved_checkpoints(run: Path) -> list[SavedCheckpoint]:
    """Return the whole checkpoints of a run, the oldest first."""
    found = []
    for path in run.iterdir() if run.is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", path.name)
        state = _whole(path) if match else None
        if match and state is not None:
            found.append(SavedCheckpoint(path, int(match[1]), state))
    return sorted(found, key=lambda one: one.step)


def _whole(path: Path) -> dict[str, Any] | None:
    """Return the state in a checkpoint if all its files have the sizes they were written with."""
    try:
        state = read_json(path / TRAINING / STATE)
        sizes = state["files"]
        whole = all((path / name).stat().st_size == size for name, size in sizes.items())
        Checkpoint.open(path / TRAINING, stem=OPTIMIZER)
    except (OSError, CheckpointError, KeyError, AttributeError):
        return None
    return state if whole else None


def best(checkpoints: list[SavedCheckpoint]) -> SavedCheckpoint | None:
    """Return the one of the lowest score, the earliest of several, if any was measured."""
    measured = [one for one in checkpoints if one.score is not None]
    return min(measured, key=lambda one: (one.score, one.step), default=None)


def put(
    run: Path,
    step: int,
    model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and return where it is.

    Args:
        run: the folder of the run.
        step: how many steps have been taken.
        model: writes the model and its tokenizer into a folder.
        tensors: of the optimisers.
        state: what JSON has of the rest.

    Raises:
        SaveError: writing failed; the checkpoints that were there are untouched.
    """
    target = run / f"step-{step:08d}"
    staging = run / f"{WRITING}{secrets.token_hex(6)}"
    try:
        disk.make(staging)
        model(staging)
        sizes = {path.name: path.stat().st_size for path in staging.iterdir() if path.is_file()}
        text = json.dumps({**state, "files": sizes}, indent=1)
        save(staging / TRAINING, tensors, stem=OPTIMIZER, text_files={STATE: text})
        disk.sync(staging)
        if os.path.lexists(target):
            _remove(target)
        disk.move(staging, target)
        disk.sync(run)
    except SaveError as error:
        raise SaveError(f"{target} is not saved: {error}") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise SaveError(
            f"{target} is not saved: {why}; the checkpoints that were there are untouched"
        ) from error
    finally:
        # Where all went well it is no longer there.
        disk.discard(staging)
    return target


def read_tensors(checkpoint: SavedCheckpoint) -> dict[str, Tensor]:
    """Return the tensors of the optimisers.

    Raises:
        CheckpointError: they cannot be read.
    """
    files = Checkpoint.open(checkpoint.path / TRAINING, stem=OPTIMIZER)
    return dict(files.read(files.tensors))


def prune(run: Path, keep: int) -> None:
    """Remove all whole checkpoints but the last `keep` and the best; what fails stays."""
    found = saved_checkpoints(run)
    spared = [*found[-keep:], best(found)]
    for one in found:
        if one not in spared:
            with suppress(OSError):
                _remove(one.path)


def clean_up(run: Path) -> None:
    """Remove what writing or removing left when it was interrupted."""
    for path in [*run.glob(f"{WRITING}*"), *run.glob(f"{REMOVING}*")]:
        disk.discard(path)


def _remove(path: Path) -> None:
    """Take a checkpoint away in one step, so that no half of it is ever taken for one."""
    gone = path.with_name(f"{REMOVING}{secrets.token_hex(6)}")
    disk.move(path, gone)
    disk.discard(gone)
