"""The figures of a machine with a GPU, tried on a small model without one."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_rows
from benchmarks.gpu_rows import BATCHES, Missing, Row
from quintet.backends import REGISTRY, Backend, Implementation
from support import small_config

CPU = torch.device("cpu")
CONFIG = small_config(max_position_embeddings=512)
SOON = 1e9


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "STEPS", 2)
    monkeypatch.setattr(gpu_rows, "NEW", 4)
    # What is compiled is the same to the timing.
    monkeypatch.setattr(gpu_rows, "compiled", lambda model, config: model)


def rows_of(until: float) -> list[Any]:
    return list(gpu_rows.measured("qwen2-0.5b", CONFIG, CPU, 64, until))


def test_every_case_is_measured_and_those_that_matter_most_come_first() -> None:
    rows = rows_of(SOON)
    assert [(row.way, row.tokens) for row in rows] == [
        *(("recorded", batch) for batch in BATCHES),
        ("as it is", 64),
        ("generate()", gpu_rows.NEW),
        # A piece of two tokens beside seven rows.
        ("as it is", 9),
        ("compiled", 1),
        ("as it is", 1),
    ]
    assert all(row.kernels for row in rows if row.read)
    # What is read is the weights and the rows of the cache.
    first, *_, last = rows[: len(BATCHES)]
    assert last.read - first.read >= (BATCHES[-1] - BATCHES[0]) * 8 * 2 * 3 * 2 * 16
    line = gpu.told(Row("qwen2-0.5b", "batch 1 behind 8", "recorded", 0.0005, 1, 99, 10**6), 1e10)
    assert line == (
        "| qwen2-0.5b | batch 1 behind 8 | recorded | 0.50 | 2,000 | 1,000 reached | 99 | 0.20 |"
    )


def test_a_published_kernel_serves_in_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def norm(*given: Any) -> None:
        calls.append(len(given))

    served = {"rms norm": (Implementation(norm, frozenset({torch.bfloat16})),)}
    toy = Backend(
        name="toy", device="cpu", implementations=served, missing=lambda: None, on_request=True
    )
    monkeypatch.setattr(gpu_rows, "BATCHES", ())
    monkeypatch.setattr(gpu_rows, "ON_REQUEST", {"toy": lambda config: True})
    with REGISTRY.registered(toy):
        rows = gpu_rows.measured("qwen2-0.5b", CONFIG, CPU, 64, SOON)
        *others, last = rows
    assert last.way == "recorded, toy"
    assert calls
    assert not any("toy" in row.way for row in others)


def test_what_there_is_no_time_for_is_named() -> None:
    rows = rows_of(0.0)
    assert len(rows) == len(BATCHES) + 5
    assert all(isinstance(row, Missing) for row in rows)
    assert gpu.told(rows[0], 1.0).startswith(
        "| qwen2-0.5b | batch 1 behind 8, recorded | there was no"
    )


def test_a_row_that_takes_too_long_or_fails_keeps_the_others_from_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = gpu_rows._kernels, [0]

    def kernels(*given: Any) -> int:
        calls[0] += 1
        if calls[0] == 1:
            # The row's time is over now, however long others take on a busy machine.
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(60)
        if calls[0] == 2:
            raise RuntimeError("an illegal memory access")
        return real(*given)

    monkeypatch.setattr(gpu_rows, "_kernels", kernels)
    slow, failed, *others = rows_of(SOON)
    assert slow.why == "TimeoutError: a row may take 45 s"
    assert failed.why == "RuntimeError: an illegal memory access"
    assert all(isinstance(row, Row) for row in others)


SAID = """\
collected 5 items

tests/gpu/test_families.py::test_logits[qwen2] PASSED                    [ 20%]
tests/gpu/test_families.py::test_logits[zamba2] FAILED                   [ 40%]
tests/gpu/test_packages.py::test_flash_mla[1] SKIPPED (there is no ...)  [ 60%]
tests/gpu/test_packages.py::test_deep_gemm """
END = """ PASSED

========================== short test summary info ===========================
FAILED tests/gpu/test_families.py::test_logits[zamba2] - AssertionError: assert 3 <= 1
============== 1 failed, 2 passed, 1 skipped in 74.03s (0:01:14) ==============
"""


def test_tests_that_failed_are_named_whether_there_was_time_for_all_or_not() -> None:
    assert gpu.outcome(SAID, 74.0).splitlines() == [
        "tests/gpu/test_families.py::test_logits[zamba2] FAILED                   [ 40%]",
        "3 tests ended within 74 s; there was no time for the others",
    ]
    assert gpu.outcome(SAID + END).splitlines() == [
        "FAILED tests/gpu/test_families.py::test_logits[zamba2] - AssertionError: assert 3 <= 1",
        "1 failed, 2 passed, 1 skipped in 74.03s (0:01:14)",
    ]


def test_peers_are_beside_them() -> None:
    pytest.importorskip("transformers")
    rows = gpu_rows.transformers("qwen2-0.5b", CONFIG, CPU, 64, SOON)
    first = next(rows)
    assert isinstance(first, Row)
    assert (first.way, first.case) == ("Transformers", "batch 1 behind 8")


SCRIPT = """
import sys, time
from benchmarks import gpu

class Timer:
    def __init__(self, seconds, function, given):
        assert seconds == 60 * 7 + gpu.GRACE
        Timer.over = lambda: function(*given)
    def start(self):
        pass

def figures(*given):
    yield gpu.Row("qwen2-7b", "batch 1 behind 8", "recorded", 0.01, 1)
    Timer.over()
    time.sleep(600)

gpu.threading.Timer, gpu.figures = Timer, figures
sys.argv = ["gpu", "--device", "cpu", "--tiny", "--no-tests", "--out", sys.argv[1]]
gpu.main()
"""


def test_what_ends_it_leaves_what_was_found(tmp_path: Path) -> None:
    """It ends itself when its minutes are over, whatever does not come back."""
    root = Path(gpu.__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    assert subprocess.run(command, cwd=root, check=False).returncode == 3
    (written,) = tmp_path.iterdir()
    assert "| qwen2-7b | batch 1 behind 8 | recorded | 10.00 | 100 |" in written.read_text()


def test_tests_that_take_too_long_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*given: Any, **how: Any) -> Any:
        raise subprocess.TimeoutExpired("pytest", 7, output=SAID.encode())

    monkeypatch.setattr(subprocess, "run", late)
    assert gpu.checks("cuda", 7.0, "tests/gpu", "gpu") == gpu.outcome(SAID, 7.0)
