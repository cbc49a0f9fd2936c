"""The process to blame, from the words of each when one of them fails; pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

from quintet.errors import RankFailedError

# failed: an error of its own. left: its script is at the end. interrupted, ended: by Ctrl-C, by
# SIGTERM. lost, late: it waited for others, and they were gone or did not come. waits: it is well.
Kind = Literal["failed", "left", "interrupted", "ended", "lost", "late", "waits"]

OURS = str(Path(__file__).parent)
TORCHS = str(Path(dist.__file__).parent.parent)
DISTRIBUTED = str(Path(dist.__file__).parent)


@dataclass(frozen=True, slots=True)
class Process:
    """A process's rank, host and id."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Word:
    """A process's report of its failure.

    Attributes:
        rank: which one.
        kind: what it is about.
        text: its error.
        place: the line it is at, of the caller's code where there is one.
        collective: whether it waits for others there.
    """

    rank: int
    kind: Kind
    text: str = ""
    place: str = ""
    collective: bool = False


def place_of(frames: Iterable[tuple[FrameType, int]]) -> tuple[str, bool]:
    """Return the line of code where frames end, from the outermost, and whether in a collective.

    What PyTorch and the passing of tensors do is not what anyone looks for.
    """
    found, collective = "", False
    for frame, line in frames:
        name = frame.f_code.co_filename
        collective = name.startswith(DISTRIBUTED)
        if not name.startswith((TORCHS, OURS, "<frozen")):
            found = f"{name}, line {line}, in {frame.f_code.co_name}"
    return found, collective


def verdict(
    words: Mapping[int, Word], who: Mapping[int, Process], seconds: float, *, late: bool
) -> RankFailedError | None:
    """Name the process to blame, from the words of each; None if a signal ended all.

    Args:
        words: by rank, in the order they were said. Who said nothing is dead or stopped.
        who: all processes.
        seconds: that they wait for each other.
        late: whether anyone waited so long; otherwise connections broke.
    """
    for word in words.values():
        if word.kind == "failed":
            location = f" ({word.place})" if word.place else ""
            return _blame(word.rank, who, f"failed: {word.text}{location}", "all end with it")
    if silent := [rank for rank in who if rank not in words]:
        more = f" (so have {len(silent) - 1} more)" if len(silent) > 1 else ""
        if late:
            return _blame(
                silent[0],
                who,
                f"has not answered for {seconds:g} s{more}",
                f"it is stopped, or its machine is gone; `py-spy dump --pid {who[silent[0]].pid}` "
                "there says where it is. Where it only takes longer, QUINTET_DISTRIBUTED_TIMEOUT "
                "sets the seconds",
            )
        return _blame(
            silent[0],
            who,
            f"is gone without a word{more}",
            "killed, out of memory (`dmesg` there says so), or crashed, as it does where processes "
            "add up tensors of different sizes; start all anew",
        )
    for kind, happened in {
        "interrupted": "was interrupted",
        "left": "ended while others wait for it",
    }.items():
        for word in words.values():
            if word.kind == kind:
                cure = "all processes have to make the same calls" if kind == "left" else ""
                return _blame(word.rank, who, happened, cure)
    if not late:
        return None
    for word in words.values():
        if word.kind == "waits" and not word.collective:
            return _blame(
                word.rank,
                who,
                f"did not come within {seconds:g} s to where others wait for it; it is at "
                f"{word.place or 'no line of Python'}",
                "all processes have to make the same calls. Where it only takes longer, "
                "QUINTET_DISTRIBUTED_TIMEOUT sets the seconds",
            )
    first, *others = sorted(words.values(), key=lambda word: word.rank)
    other = next((word for word in others if word.place != first.place), others[-1])
    return _blame(
        other.rank,
        who,
        f"waits at {other.place}, and rank {first.rank} at {first.place}, for {seconds:g} s",
        "all processes have to make the same calls, in the same order, with tensors of one shape",
    )


def _blame(rank: int, who: Mapping[int, Process], happened: str, cure: str) -> RankFailedError:
    return RankFailedError(rank, f"({who[rank]}) {happened}" + (f"; {cure}" if cure else ""))
