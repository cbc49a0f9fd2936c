"""Some hundred mutants of every kind of file; `make fuzz` tries many more."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz import running
from fuzz.mutants import mutant
from fuzz.running import Target, fuzz
from fuzz.targets import TARGETS
from quintet.errors import CheckpointError

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
SECONDS = 0.25
RIGHT = b'{"a": [1, 2, 3]}'


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_mutant_is_read_or_refused(target: Target) -> None:
    report = fuzz(target, range(300), seconds=SECONDS)
    assert not report.faults, "\n".join(map(str, report.faults))
    assert report.tried == report.read + report.refused > 0


def made(root: Path) -> None:
    root.mkdir()
    (root / "file").write_bytes(RIGHT)


def _raise(root: Path) -> None:
    raise KeyError("raw")


def _hang(root: Path) -> None:
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass


def _swell(root: Path) -> bytearray:
    return bytearray(300_000_000)


def _die(root: Path) -> None:
    os._exit(3)


def _exhaust(root: Path) -> bytearray:
    return bytearray(2**32)


def _speak(root: Path) -> None:
    raise CheckpointError("\udcff")


def bad(read: Callable[[Path], Any]) -> Target:
    def on_mutants(root: Path) -> None:
        if (root / "file").read_bytes() != RIGHT:
            read(root)

    return Target(name="bad", make=made, files=("file",), read=on_mutants)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_raise, "KeyError"),
        (_swell, "MB"),
        (_die, "died"),
        (_exhaust, "MemoryError"),
        (_speak, "cannot be printed"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_no_answer_is_found(read: Any, said: str) -> None:
    report = fuzz(bad(read), range(1))
    assert len(report.faults) == 1
    assert said in report.faults[0].what


def test_what_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SECONDS", 0.2)
    report = fuzz(bad(_hang), range(1))
    assert len(report.faults) == 1
    assert "took 0." in report.faults[0].what


def test_one_mutant_is_tried_however_little_time_there_is() -> None:
    assert fuzz(bad(_raise), range(10), seconds=0.0).tried == 1


def test_a_number_names_one_mutant() -> None:
    seen: list[list[bytes]] = [[], []]
    for one in seen:
        for number in range(20):
            one.append(mutant(RIGHT, Random(f"0 x {number}")))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 15
