"""Whatever happens to one of several processes, all end soon and say which one it was."""

from pathlib import Path

import pytest

from parallel.cases import faults
from parallel.launching import Ended, launch

# Seconds: how long one may be waited for where that is what ends it, and where it must not be.
TIMEOUT, LONG = 5, 600
# What is told at once is told in less, on a machine as busy as can be.
SOON = 60.0


def happens(
    what: str, where: Path, size: int = 2, victim: int = 1, timeout: int = LONG
) -> tuple[list[Ended], float]:
    """Return how the processes ended, and how long that took the last but the victim."""
    environment = {"QUINTET_DISTRIBUTED_TIMEOUT": str(timeout)}
    ended = launch(
        size,
        faults.happens,
        *(what, victim, where),
        where=where,
        environment=environment,
        ends_others=what == "loops",
    )
    happened = float((where / "happened").read_text())
    return ended, max(one.at for one in ended) - happened


def said(ended: list[Ended]) -> list[str]:
    """Return the lines that name a failure, of all processes together."""
    lines = [line for one in ended for line in one.err.splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def test_without_a_fault_all_end_well(tmp_path: Path) -> None:
    ended, _ = happens("nothing", tmp_path)
    assert [(one.code, one.out, one.err) for one in ended] == [(0, "ended 2\n", "")] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_is_told_by_all(victim: int, tmp_path: Path) -> None:
    ended, seconds = happens("raises", tmp_path, victim=victim)
    assert [one.code for one in ended] == [1, 1]
    assert seconds < SOON
    assert "ValueError: no such number" in ended[victim].err.splitlines()[-1]
    (line,) = said(ended)
    assert f"rank {victim} " in line
    assert "failed: ValueError: no such number" in line
    assert "cases/faults.py, line" in line
    assert "Traceback" not in ended[1 - victim].err


@pytest.mark.parametrize("victim", [0, 1])
def test_who_was_killed_is_named_and_all_end(victim: int, tmp_path: Path) -> None:
    ended, seconds = happens("is killed", tmp_path, 3, victim=victim)
    assert seconds < SOON
    assert ended[victim].code == -9
    assert [one.code for rank, one in enumerate(ended) if rank != victim] == [1, 1]
    (line,) = set(said(ended))
    assert f"rank {victim} (process " in line
    assert "is gone" in line


def test_who_waits_in_vain_for_one_that_is_well_is_ended(tmp_path: Path) -> None:
    """Nothing breaks between them, and the time they may wait is long."""
    ended = launch(3, faults.waits_in_vain, tmp_path, where=tmp_path, ends_others=True)
    assert all(one.code for one in ended)
    assert ended[0].at - float((tmp_path / "happened").read_text()) < SOON
    (line,) = said(ended)
    assert "rank 1 (process " in line
    assert "failed: ValueError" in line


def test_who_stands_still_is_named_after_the_timeout(tmp_path: Path) -> None:
    ended, seconds = happens("is stopped", tmp_path, timeout=TIMEOUT)
    # Others may have begun to wait before it happened.
    assert TIMEOUT / 2 < seconds < TIMEOUT + SOON
    assert ended[0].code == 1
    (line,) = said(ended[:1])
    assert "rank 1 (process " in line
    assert f"has not answered for {TIMEOUT} s" in line
    assert "QUINTET_DISTRIBUTED_TIMEOUT" in line


def test_who_does_not_come_is_named_with_where_it_is(tmp_path: Path) -> None:
    ended, _ = happens("loops", tmp_path, timeout=TIMEOUT)
    assert ended[0].code == 1
    (line,) = said(ended[:1])
    assert "rank 1 " in line
    assert f"did not come within {TIMEOUT} s" in line
    assert "cases/faults.py, line" in line
    assert "in _happens" in line


def test_different_calls_are_told_with_where_each_is(tmp_path: Path) -> None:
    ended, seconds = happens("calls another", tmp_path, timeout=TIMEOUT)
    assert [one.code for one in ended] == [1, 1]
    assert seconds < TIMEOUT + SOON
    (line,) = said(ended)
    assert "in happens, and rank 0 at" in line or "in _happens, and rank 0 at" in line
    assert "the same calls" in line


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("is interrupted", "was interrupted"),
        ("leaves", "ended while others wait for it"),
    ],
)
def test_who_ends_before_the_others_is_named(what: str, told: str, tmp_path: Path) -> None:
    ended, seconds = happens(what, tmp_path)
    assert seconds < SOON
    assert ended[0].code == 1
    (line,) = said(ended)
    assert "rank 1 " in line
    assert told in line


def test_sigterm_ends_all_in_silence(tmp_path: Path) -> None:
    ended, seconds = happens("is told to end", tmp_path)
    assert seconds < SOON
    assert all(one.code for one in ended)
