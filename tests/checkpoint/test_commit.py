"""Saves that fail or die at every call that can: the old checkpoint or the new, never a mix."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quintet.checkpoint import Checkpoint, disk, recover, save
from quintet.errors import CheckpointError, SaveError
from quintet.files import locked

# How many tensors are in a shard of the old and of the new checkpoint; 6 of 6 are one file.
CASES = {
    "nothing to one": (None, 6),
    "nothing to three": (None, 2),
    "one to one": (6, 6),
    "one to three": (6, 2),
    "three to one": (2, 6),
    "three to three": (2, 2),
    "three to six": (2, 1),
    "six to three": (1, 2),
}
CALLS = ("open", "fsync", "replace", "link", "unlink", "mkdir")


def write(directory: Path, value: int, per_shard: int) -> None:
    tensors = {f"w{i}": torch.full((8,), float(value)) for i in range(6)}
    texts = {"config.json": f"config {value}", f"only-{value}.json": f"only {value}"}
    save(directory, tensors, max_shard_size=32 * per_shard, text_files=texts)


class Faults:
    """Stands for `os` and `open` in the module that touches the disk, and counts the calls."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.calls = 0
        self.act = act

    def step(self) -> None:
        self.calls += 1
        self.act(self.calls)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any) -> Any:
            self.step()
            # No power fails here, and waiting for the disk is most of the time that this takes.
            return None if name == "fsync" else real(*arguments)

        return call

    def open_file(self, path: Path, mode: str) -> Any:
        self.step()
        file = open(path, mode, buffering=0)  # noqa: SIM115  (the caller closes it)
        return Leaky(file, self)


class Leaky:
    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def __enter__(self) -> "Leaky":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, chunk: bytes | memoryview) -> None:
        self.file.write(chunk[: len(chunk) // 2])
        self.faults.step()
        self.file.write(chunk[len(chunk) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], Faults]:
    def install(act: Callable[[int], None]) -> Faults:
        faults = Faults(act)
        monkeypatch.setattr(disk, "os", faults)
        monkeypatch.setattr(disk, "open", faults.open_file, raising=False)
        return faults

    return install


def texts(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.glob("*.json") if "c" in path.stem}


def found(directory: Path) -> int | None:
    """Return the value that weights and texts agree on, or None if the directory is refused."""
    naive = {value for tensor in naively(directory).values() for value in tensor.tolist()}
    assert len(naive) <= 1, "other readers see no mix either"
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        assert str(directory) in str(error)  # noqa: PT017  (both outcomes are right)
        return None
    read = dict(checkpoint.read(checkpoint.tensors))
    assert len(read) == 6
    (value,) = {int(value) for tensor in read.values() for value in tensor.tolist()}
    assert (directory / "config.json").read_text() == f"config {value}"
    assert (directory / f"only-{value}.json").read_text() == f"only {value}"
    return value


def naively(directory: Path) -> dict[str, torch.Tensor]:
    """Read as a reader does that knows neither of notes nor of ids."""
    if (directory / "model.safetensors").exists():
        return load_file(directory / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return {}
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {shard: load_file(directory / shard) for shard in set(weight_map.values())}
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def assert_usable(directory: Path) -> None:
    """The next save works and leaves nothing behind."""
    write(directory, 3, 2)
    assert found(directory) == 3
    assert leftovers(directory) == []
    weights = sorted(path.name for path in directory.glob("model*"))
    assert weights == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]


def boundaries(run: Callable[[int], bool]) -> int:
    """Run with a fault at call 1, 2, … until one is not reached, and return how many were."""
    at = 1
    while run(at):
        at += 1
    return at - 1


@pytest.mark.filterwarnings("ignore:.*could not be removed")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["once", "from then on", "interrupt"])
def test_a_failure_at_any_call_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path,
    case: str,
    kind: str,
    broken: Callable[[Callable[[int], None]], Faults],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after = CASES[case]

    def run(at: int) -> bool:
        directory = tmp_path / str(at)
        directory.mkdir()
        if before:
            write(directory, 1, before)

        def act(call: int) -> None:
            if call == at and kind == "interrupt":
                raise KeyboardInterrupt
            if call == at or (call > at and kind == "from then on"):
                raise OSError(errno.ENOSPC, "No space left on device")

        files = sorted(path.name for path in directory.iterdir())
        faults = broken(act)
        failed, said = False, ""
        try:
            write(directory, 2, after)
        except SaveError as error:
            failed, said = True, str(error)
            assert str(directory) in str(error)  # noqa: PT017  (success is right as well)
            assert "No space left" in str(error)  # noqa: PT017
            assert "192 bytes" in str(error)  # noqa: PT017
            assert "are free" in str(error)  # noqa: PT017
        except KeyboardInterrupt:
            failed = True
        monkeypatch.setattr(disk, "os", os)
        monkeypatch.delattr(disk, "open")
        state = found(directory)
        if not failed:
            assert state == 2
        elif kind == "once":
            assert state == (1 if before else None)
            assert sorted(path.name for path in directory.iterdir()) == files
        elif kind == "interrupt":
            assert state in ((1, 2) if before else (None, 2))
        else:
            # The texts could not be put back, and their note and the error say so.
            refused = state is None and bool(before)
            assert not before or refused == ("could not be put back" in said)
            assert not refused or leftovers(directory)
        # An interrupt while the temporary directory is removed leaves the rest to the next save.
        if kind == "once" or (kind == "interrupt" and state != 2):
            assert leftovers(directory) == []
        if state == 1:
            assert not (directory / "only-2.json").exists()
        assert_usable(directory)
        return faults.calls >= at

    assert boundaries(run) > 10


DRIVER = """
import os, shutil, signal, sys
from pathlib import Path

os.fsync = lambda handle: None
sys.path.insert(0, sys.argv[1])
from test_commit import CASES, Faults, write
from quintet.checkpoint import disk

for case, (before, after) in CASES.items():
    old = Path(sys.argv[2]) / "old" / case
    old.mkdir(parents=True)
    if before:
        write(old, 1, before)
    at = 0
    while True:
        at += 1
        directory = Path(sys.argv[2]) / case / str(at)
        shutil.copytree(old, directory)
        child = os.fork()
        if not child:
            faults = Faults(lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == at else 0)
            disk.os, disk.open = faults, faults.open_file
            write(directory, 2, after)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, (case, at, status)
            break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes to kill")
def test_a_kill_at_any_call_leaves_the_old_the_new_or_a_refusal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for case, (before, _) in CASES.items():
        states = []
        for at in range(1, len(list((tmp_path / case).iterdir())) + 1):
            directory = tmp_path / case / str(at)
            states.append(found(directory))
            recover(directory)
            again = found(directory)
            assert again == states[-1] or (states[-1], again) == (None, 1)
            assert again in ((1, 2) if before else (None, 2)), "the next load finds one of both"
            assert_usable(directory)
        assert len(states) > 10
        assert states[0] == (1 if before else None)
        assert states[-1] == 2
        known = [state for state in states if state]
        assert known == sorted(known), "from old to new, once"


def test_a_save_that_died_between_texts_and_weights_is_refused_then_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 6)
    staging = tmp_path / ".saving-0123456789abcdef"
    staging.mkdir()
    (staging / "model.safetensors").touch()
    note = {"last_step": "model.safetensors", "texts": {"config.json": "config 1", "new": None}}
    (staging / "undo.json").write_text(json.dumps(note))
    (tmp_path / "config.json").write_text("config 2")
    (tmp_path / "new").touch()
    with pytest.raises(CheckpointError, match="half of a save") as caught:
        Checkpoint.open(tmp_path)
    assert str(staging) in str(caught.value)

    with locked(tmp_path):
        assert not recover(tmp_path)
    assert found(tmp_path) is None, "another process may be saving still"

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "make", full)
    with pytest.raises(SaveError):
        write(tmp_path, 2, 6)
    assert found(tmp_path) == 1
    assert not (tmp_path / "new").exists()
