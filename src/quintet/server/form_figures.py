"""Counts of the forms that answers of a model were held to, and of the calls in them."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from quintet.serving.figures import STEPS, Distributing, Distribution


@dataclass(frozen=True, slots=True)
class FormSnapshot:
    """The counts at one time.

    Attributes:
        compiling: how many forms are compiled now.
        late: of these, those that nobody waits for any more: their threads go on until they end.
        compile_seconds: how long each took, those that came too late as well.
        refused: how many requests got no form, by the reason: "invalid", "late" where theirs took
            too long, "busy" where those of others did.
        masks: how many masks of tokens were made.
        mask_seconds: how long these took together.
        calls: how many calls of tools were read.
        broken: how many texts began as a call, and are content as it had no end.
    """

    compiling: int
    late: int
    compile_seconds: Distribution
    refused: Mapping[str, int]
    masks: int
    mask_seconds: float
    calls: int
    broken: int


class FormFigures:
    """Counters of one model; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiling = self._late = 0
        self._seconds = Distributing(STEPS)
        self._refused: Counter[str] = Counter()
        self._masks, self._mask_seconds = 0, 0.0
        self._calls = self._broken = 0

    def begin(self) -> "Compilation":
        """Count a form that begins to be compiled."""
        with self._lock:
            self._compiling += 1
        return Compilation(self)

    def refuse(self, why: str) -> None:
        """Count a request that got no form."""
        with self._lock:
            self._refused[why] += 1

    def masked(self, masks: int, seconds: float) -> None:
        """Count the masks of an answer."""
        with self._lock:
            self._masks += masks
            self._mask_seconds += seconds

    def parsed(self, calls: int, broken: int) -> None:
        """Count the calls of an answer."""
        with self._lock:
            self._calls += calls
            self._broken += broken

    def snapshot(self) -> FormSnapshot:
        """Return the present counts."""
        with self._lock:
            return FormSnapshot(
                self._compiling,
                self._late,
                self._seconds.frozen(),
                dict(self._refused),
                self._masks,
                self._mask_seconds,
                self._calls,
                self._broken,
            )

    def ended(self, seconds: float, *, late: bool) -> None:
        """Count a form that is compiled, or cannot be."""
        with self._lock:
            self._compiling -= 1
            self._late -= late
            self._seconds.add(seconds)

    def given_up(self) -> None:
        """Count a form that is no longer waited for."""
        with self._lock:
            self._late += 1
            self._refused["late"] += 1


class Compilation:
    """A form that is compiled, and may be given up before its end."""

    def __init__(self, figures: FormFigures) -> None:
        self._figures, self._began = figures, time.monotonic()
        self._lock = threading.Lock()
        self._given_up = self._ended = False

    def give_up(self) -> None:
        """Count that nobody waits for it any more."""
        with self._lock:
            if self._ended:
                self._figures.refuse("late")
            else:
                self._given_up = True
                self._figures.given_up()

    def end(self) -> None:
        """Count that its thread is free again."""
        with self._lock:
            self._ended = True
            self._figures.ended(time.monotonic() - self._began, late=self._given_up)
