"""Mutants are tried in a process of their own, which may hang, swell or die."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutants import mutant
from quintet.errors import QuintetError

__all__ = ["Found", "Report", "Target", "fuzz"]

SECONDS = 5.0
MEGABYTES = 200
# Mutants are written to memory where that is a folder: a disk would take most of the time.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# A process is ended that does not come back; its own clock is asked for all that does.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A reader of a file.

    Attributes:
        name: what it is called by.
        make: writes a directory in which everything is right.
        files: the files of it that are changed, one at a time.
        read: reads the directory; a `QuintetError` is an answer, any other error is a fault.
        also: further errors that are an answer (what is documented of a function that has no
            path, for example).
        change: what changes the bytes of a file; by default, every kind of mutant.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    also: tuple[type[Exception], ...] = ()
    change: Callable[[bytes, Random], bytes] = mutant


@dataclass(frozen=True, slots=True)
class Found:
    """A mutant that was not answered as it should be; `--only` and `--at` bring it back."""

    target: str
    number: int
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.target} {self.number}: {self.what}\n{self.detail}"


@dataclass(slots=True)
class Report:
    """What came of the mutants of one target."""

    tried: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0
    faults: list[Found] = field(default_factory=list)
    began: float = float("inf")

    def ended(self, seconds: float, most: int) -> bool:
        """Whether there were faults enough, or the time since the first answer is over."""
        return len(self.faults) >= most or time.monotonic() - self.began >= seconds


def fuzz(
    target: Target, numbers: range, seed: int = 0, *, seconds: float = float("inf"), most: int = 20
) -> Report:
    """Try mutants of a target, each decided by the seed and its number.

    Args:
        seconds: how long, from the first answer on; one mutant is tried however little it is.
        most: how many faults are enough.
    """
    report = Report()
    with tempfile.TemporaryDirectory(prefix="quintet-fuzz-", dir=MEMORY) as folder:
        seeds = Path(folder) / "seeds"
        target.make(seeds)
        while numbers and not report.ended(seconds, most):
            numbers = _one_process(target, seeds, numbers, seed, seconds, most, report)
    return report


def _one_process(
    target: Target,
    seeds: Path,
    numbers: range,
    seed: int,
    seconds: float,
    most: int,
    report: Report,
) -> range:
    """Let one process try mutants until it dies or is done, and return what is left."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_try_all, args=(target, seeds, numbers, seed, theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        while numbers and not report.ended(seconds, most):
            at, numbers = numbers[0], numbers[1:]
            if not _answers(process.pid, ours):
                report.faults.append(Found(target.name, at, f"no end within {PATIENCE:.0f} s"))
                return numbers
            what, detail, took, size = ours.recv()
            if not report.tried:
                report.began = time.monotonic()
            report.tried += 1
            report.read += what == "read"
            report.refused += what == "refused"
            report.slowest = max(report.slowest, took)
            report.largest = max(report.largest, size)
            if what not in ("read", "refused"):
                report.faults.append(Found(target.name, at, what, detail))
            elif took > SECONDS or size > MEGABYTES:
                spent = f"took {took:.1f} s and {size} MB"
                report.faults.append(Found(target.name, at, spent, detail))
            if size > MEGABYTES:
                return numbers
    except EOFError:
        process.join(5)
        report.faults.append(Found(target.name, at, f"the process died ({process.exitcode})"))
    finally:
        process.kill()
        process.join()
        ours.close()
    return numbers


def _answers(pid: int | None, answers: Connection) -> bool:
    """Wait for a process: longer where it is the machine that it waits for, as on a busy one."""
    for _ in range(10):
        before = _processor_seconds(pid)
        if answers.poll(PATIENCE):
            return True
        if _processor_seconds(pid) - before > SECONDS:
            break
    return False


def _processor_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _try_all(target: Target, seeds: Path, numbers: range, seed: int, to: Connection) -> None:
    warnings.simplefilter("ignore")
    # What libraries print about their own errors belongs to nobody.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with tempfile.TemporaryDirectory(prefix="quintet-mutant-", dir=MEMORY) as folder:
        # What a reader writes for itself is there too.
        tempfile.tempdir = folder
        root = Path(folder) / "model"
        shutil.copytree(seeds, root)
        with contextlib.suppress(Exception):
            target.read(root)  # what is imported and compiled once is no mutant's
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for number in numbers:
            to.send(_try(target, seeds, root, number, seed))


def _try(
    target: Target, seeds: Path, root: Path, number: int, seed: int
) -> tuple[str, str, float, int]:
    with _changed(target, seeds, root, number, seed):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        what, detail = "read", ""
        try:
            target.read(root)
        except QuintetError as error:
            what = "refused"
            try:
                f"{error}".encode()
            except UnicodeEncodeError:
                what, detail = "a message that cannot be printed", repr(str(error))[:300]
            else:
                if len(str(error)) > 20_000:
                    what, detail = "a message without end", str(error)[:300]
        except target.also:
            what = "refused"
        # A panic of a library in Rust is no Exception.
        except BaseException as error:
            what = f"{type(error).__name__}: {str(error)[:200]!r}"
            detail = "".join(traceback.format_exception(error)[-3:])
        took = time.process_time() - began
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return what, detail, took, size // 1024


@contextlib.contextmanager
def _changed(target: Target, seeds: Path, root: Path, number: int, seed: int) -> Iterator[None]:
    random = Random(f"{seed} {target.name} {number}")
    name = random.choice(target.files)
    content = (seeds / name).read_bytes()
    (root / name).write_bytes(target.change(content, random))
    try:
        yield
    finally:
        (root / name).write_bytes(content)


def keep(target: Target, number: int, seed: int, directory: Path) -> None:
    """Write the directory with one mutant, to be looked at."""
    target.make(directory)
    seeds = directory.with_name(f"{directory.name}.seeds")
    shutil.copytree(directory, seeds)
    random = Random(f"{seed} {target.name} {number}")
    name = random.choice(target.files)
    (directory / name).write_bytes(target.change((seeds / name).read_bytes(), random))
    shutil.rmtree(seeds)
