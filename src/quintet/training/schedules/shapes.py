"""The schedules of learning rates that have names."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal

from quintet.training.progress import Progress
from quintet.training.schedules.segments import Course, Segment, Shape, finite, share
from quintet.training.settings import SettingError
from quintet.training.spans import span


@dataclass(frozen=True)
class Rising(ABC):
    """A schedule that rises linearly to its peak, and then follows its class's course.

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
    """

    peak: float = 1.0
    _: KW_ONLY
    warmup: float | str = 0.01

    def __post_init__(self) -> None:
        """Refuse values that make no course."""
        finite(self.peak, "peak")
        span(self.warmup, "warmup")
        _ = self._course

    @abstractmethod
    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""

    @cached_property
    def _course(self) -> Course:
        return Course(0.0, [Segment(self.warmup, self.peak), *self.then()])

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        return self._course.at(progress)


@dataclass(frozen=True)
class WarmupStableDecay(Rising):
    """Rise linearly to the peak, stay, and fall at the very end (arXiv:2404.06395 §4).

    The long middle has no end built in: a training goes on from there, and falls when it is to end.

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
        decay: the share of the training, counted from its end, in which it falls.
        end: what is left of the peak at the end, as a share of it.
        shape: how it falls.
    """

    _: KW_ONLY
    decay: float = 0.2
    end: float = 0.0
    shape: Shape = "linear"
    kind: Literal["wsd"] = "wsd"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        return [
            Segment(1 - share(self.decay, "decay"), self.peak, "constant"),
            Segment(1.0, self.peak * share(self.end, "end"), self.shape),
        ]


@dataclass(frozen=True)
class Cosine(Rising):
    """Rise linearly, then fall as half a cosine (arXiv:1608.03983 eq. 5).

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
        end: what is left of the peak at the end, as a share of it.
    """

    _: KW_ONLY
    end: float = 0.1
    kind: Literal["cosine"] = "cosine"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        return [Segment(1.0, self.peak * share(self.end, "end"), "cosine")]


@dataclass(frozen=True)
class Linear(Rising):
    """Rise linearly, then fall linearly, to nothing as a rule (arXiv:2502.15938).

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
        end: what is left of the peak at the end, as a share of it.
    """

    _: KW_ONLY
    end: float = 0.0
    kind: Literal["linear"] = "linear"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        return [Segment(1.0, self.peak * share(self.end, "end"))]


@dataclass(frozen=True)
class Steps(Rising):
    """Rise linearly, then stay, and be multiplied by a factor at each border.

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
        borders: where it falls, each a share of the training, or "10_000 steps".
        factor: what is left each time.
    """

    _: KW_ONLY
    borders: tuple[float | str, ...] = (0.6, 0.9)
    factor: float = 0.316
    kind: Literal["steps"] = "steps"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        for number, border in enumerate(self.borders):
            span(border, f"borders.{number}")
        values = [self.peak * share(self.factor, "factor") ** i for i in range(len(self.borders))]
        stays = [Segment(b, v, "constant") for b, v in zip(self.borders, values, strict=True)]
        return [*stays, Segment(1.0, self.peak * self.factor ** len(values), "constant")]


@dataclass(frozen=True)
class InverseSqrt:
    """Rise linearly for w, then fall as √(w/x) (arXiv:1706.03762 §5.3).

    Attributes:
        peak: the highest value.
        warmup: how long it rises, w: a share of the training, or "2000 steps".
    """

    peak: float = 1.0
    _: KW_ONLY
    warmup: float | str = 0.01
    kind: Literal["inverse-sqrt"] = "inverse-sqrt"

    def __post_init__(self) -> None:
        """Refuse a rise of no length."""
        finite(self.peak, "peak")
        if not span(self.warmup, "warmup").length:
            raise SettingError.value("warmup", self.warmup, "is what all is measured by: above 0")

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        warmup = span(self.warmup, "warmup")
        x = warmup.of(progress) / warmup.length
        return self.peak * (x if x < 1 else 1 / math.sqrt(x))
