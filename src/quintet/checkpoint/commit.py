"""Finished files take the place of an older checkpoint, in an order that never mixes the two.

Readers prefer `model.safetensors`, else they follow the index. So there is always one step that
turns the old checkpoint into the new one, whatever each consists of:

- to one file: it replaces `model.safetensors`;
- from one file to shards: shards and index are put beside it, then it is moved away;
- from shards to shards: the new shards are put beside the old under other names, then the index
  is replaced. Where the names would be the same they get an infix, which is taken out afterwards.

Text files cannot be a part of that step. They go first, and a note of what they were is kept:
while the note is there and the step is not done, `Checkpoint.open` refuses the directory, and
this save if it goes on to fail, or the next, restores them.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quintet.checkpoint import disk
from quintet.checkpoint.layout import (
    FINAL_INDEX,
    REPLACED,
    STAGING,
    UNDO,
    Names,
)
from quintet.checkpoint.reading import half_moved

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Staged:
    """The finished files of a save, in a temporary directory inside the target."""

    staging: Path
    weights: Mapping[str, str]
    """The name of each file of weights in `staging`, and the one it is to have in the end."""
    texts: Mapping[str, str]
    names: Names

    @property
    def directory(self) -> Path:
        """The target directory."""
        return self.staging.parent

    @property
    def sharded(self) -> bool:
        """Whether an index belongs to the weights."""
        return self.names.single not in self.weights


def put_in_place(staged: Staged) -> list[Path]:
    """Move staged files into place and remove those they replace; return the new paths.

    Raises:
        OSError: it failed, and what was there before is there again.
    """
    directory, staging = staged.directory, staged.staging
    single, index = staged.names.single, staged.names.index
    last = index if staged.sharded else single
    replaces = staged.sharded and os.path.lexists(directory / single)
    changed = [name for name, text in staged.texts.items() if _read(directory / name) != text]
    # The index goes first: without its shards it would be an error, they alone are none.
    stale = [] if staged.sharded else [directory / index]
    stale += [path for path in sorted(directory.iterdir()) if staged.names.is_shard(path.name)]
    moved: list[Path] = []
    try:
        if changed:
            _write_undo(staged, changed, REPLACED if replaces else last)
        if staged.sharded:
            for name in [*staged.weights, *([index] if replaces else [])]:
                moved.insert(0, directory / name)
                disk.move(staging / name, directory / name)
        for name in changed:
            disk.move(staging / name, directory / name)
        disk.sync(directory)
        if replaces:
            disk.move(directory / single, staging / REPLACED)
        else:
            disk.move(staging / last, directory / last)
    except BaseException:
        # An interrupt may come right after the last step; then there is nothing to take back.
        if os.path.lexists(staging / REPLACED if replaces else staging / last) != replaces:
            for path in moved:
                with suppress(OSError):
                    disk.remove(path)
            _undo(staging)
        raise
    return _finish(staged, stale)


def clean_up(directory: Path) -> None:
    """Remove the files of interrupted saves, and undo their half-done moves.

    Raises:
        OSError: a text file could not be restored.
    """
    for staging in directory.glob(f"{STAGING}*"):
        if staging.is_symlink() or not staging.is_dir():
            continue
        _undo(staging)
        disk.discard(staging)


def _finish(staged: Staged, stale: list[Path]) -> list[Path]:
    """Complete a save whose new checkpoint is valid already; failures here do no harm."""
    directory = staged.directory
    names, finals = list(staged.weights), list(staged.weights.values())
    # What the disk may still believe in must not be removed.
    sure = _attempt(disk.sync, directory)
    if sure and names != finals:
        sure = _attempt(_take_infixes_out, staged)
        if os.path.lexists(staged.staging / FINAL_INDEX):
            sure = True
        else:
            stale = [*stale, *(directory / name for name in names)]
            names = finals
    committed = [*names, staged.names.index] if staged.sharded else names
    for path in stale if sure else []:
        if path.name not in committed and not _attempt(disk.remove, path):
            warnings.warn(f"{path} is no longer used and could not be removed", stacklevel=4)
    return [directory / name for name in [*committed, *staged.texts]]


def _take_infixes_out(staged: Staged) -> None:
    """Rename shards to their usual names; the index never names a missing one."""
    directory, staging = staged.directory, staged.staging
    for name, final in staged.weights.items():
        disk.same_file_as(directory / name, staging / final)
        disk.move(staging / final, directory / final)
    disk.sync(directory)
    disk.move(staging / FINAL_INDEX, directory / staged.names.index)
    disk.sync(directory)


def _attempt(step: Callable[[T], None], on: T) -> bool:
    try:
        step(on)
    except OSError:
        return False
    return True


def _write_undo(staged: Staged, names: list[str], last_step: str) -> None:
    texts = {name: _read(staged.directory / name) for name in names}
    # Whole or not at all, as every reader of the directory looks at it.
    part = staged.staging / f"{UNDO}.part"
    disk.write(part, [json.dumps({"last_step": last_step, "texts": texts}).encode()])
    disk.move(part, staged.staging / UNDO)
    disk.sync(staged.staging)
    disk.sync(staged.directory)


def _undo(staging: Path) -> None:
    """Restore the text files that an undo note lists, and remove the note."""
    texts = half_moved(staging)
    if texts is None:
        return
    spare = staging / "restored"
    for name, text in texts.items():
        if text is None:
            disk.remove(staging.parent / name)
        else:
            disk.remove(spare)
            disk.write(spare, [text.encode("utf-8", "surrogateescape")])
            disk.move(spare, staging.parent / name)
    disk.sync(staging.parent)
    disk.remove(staging / UNDO)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
