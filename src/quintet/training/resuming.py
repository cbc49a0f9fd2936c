"""Resuming a run: the checkpoint to start from, and whether the result would be the same."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from quintet.errors import CheckpointError, InputError, shown
from quintet.training.checkpoints import SavedCheckpoint, saved_checkpoints

# Of what a checkpoint holds to go on from; it changes with that.
FORMAT = 1

Resume = bool | Literal["changed"]

# What does not change what is learned: how long, how it is told, what is kept.
# Where texts lie does not either: what they are is told by the fingerprint of the data.
FREE = (
    *("train.folder", "train.skips", "checkpoint", "evaluation", "report", "parallel"),
    *("data.cache", "data.sources", "data.held_out_sources"),
)
# The kind of a budget counts, and how much of it does not: it may be extended.
BUDGETS = ("train.steps", "train.tokens", "train.minutes")


def start_of(run: Path, resume: Resume) -> SavedCheckpoint | None:
    """Return the checkpoint that a run resumes from, or None at a beginning.

    Raises:
        InputError: it is to begin where there is a run already.
    """
    if resume not in (True, False, "changed"):
        raise InputError(f'resume={resume!r} has to be True, False or "changed"')
    found = saved_checkpoints(run)
    if found and not resume:
        raise InputError(
            f"{run} holds a run of {found[-1].step} steps; go on with it by resume=True "
            "(--resume), or name "
            "another folder"
        )
    return found[-1] if found else None


def check_same(start: SavedCheckpoint, now: Mapping[str, Any], resume: Resume) -> list[str]:
    """Compare a run's settings with the checkpoint's; return the differences that are allowed.

    Args:
        start: the checkpoint.
        now: the settings, the fingerprint of the data or the dtype, by the names that the state of
            a checkpoint has for them.
        resume: "changed" if they may be others.

    Raises:
        InputError: something differs, and was not to.
    """
    differ = [line for key in now for line in differences(start.state.get(key), now[key], key)]
    if differ and resume != "changed":
        raise InputError(
            f"{start.path} was made by another training, and would not go on to the same numbers:\n"
            + "\n".join(f"  {line}" for line in differ[:10])
            + '\nPut it back, begin in another folder, or go on all the same by resume="changed" '
            "(--resume-changed)"
        )
    return differ


def check_format(start: SavedCheckpoint) -> None:
    """Check that this version can resume from a checkpoint.

    Raises:
        CheckpointError: it does not.
    """
    needed = {"counters", "random", "surroundings"}
    if start.state.get("format") != FORMAT or not needed <= set(start.state):
        raise CheckpointError(
            f"{start.path} cannot be gone on with: it is of another version of this library; "
            "its model can, as [model] from of a training in another folder"
        )


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences between the surroundings of a training before and now."""
    return [
        f"{name} is {now.get(name)}, and was {was}: numbers are rounded otherwise from here on"
        for name, was in before.items()
        if now.get(name) != was
    ]


def differences(before: Any, after: Any, key: str) -> Iterator[str]:
    """Yield the differences between two plain values, except in fields that may differ."""
    name = key.removeprefix("settings.")
    if name in FREE or before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for item in {**before, **after}:
            yield from differences(before.get(item), after.get(item), f"{key}.{item}")
    elif name not in BUDGETS or None in (before, after):
        was = "not there" if before is None else shown(before)
        yield f"{name} is {'not there' if after is None else shown(after)}, and was {was}"


def surroundings(processes: str) -> dict[str, Any]:
    """Return the surroundings, besides settings, that decide rounding and random numbers."""
    return {
        "processes": processes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
