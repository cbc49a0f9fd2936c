"""A number that goes from one value to the next, stretch by stretch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

from quintet.configuration.numbers import is_finite
from quintet.training.progress import Progress
from quintet.training.settings import SettingError
from quintet.training.spans import Span, span

Shape = Literal["constant", "linear", "cosine", "sqrt", "exponential"]

# How much of the way from one value to the next is gone when a share of the stretch is.
_GONE: Mapping[Shape, Callable[[float], float]] = MappingProxyType(
    {
        "constant": lambda part: 1.0,
        "linear": lambda part: part,
        "cosine": lambda part: (1 - math.cos(math.pi * part)) / 2,
        "sqrt": math.sqrt,
    }
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a training, and where the number goes in it.

    Attributes:
        until: where it ends, from the beginning of the training: a share, or "10T tokens".
        to: the value at its end.
        shape: how the value gets there. "constant" has it from the first step on; with t of the
            stretch done, "linear" has gone t of the way, "cosine" (1 - cos πt)/2, "sqrt" √t
            (arXiv:2405.18392 §3), and "exponential" multiplies: a^(1-t)·b^t.
    """

    until: float | str
    to: float
    shape: Shape = "linear"


class Course:
    """A piecewise course of a number over a training.

    A stretch may begin in another unit than it ends in, as a fall by shares behind a rise by
    steps. It is measured in the unit of its end; where it began in that unit follows from how far
    the training is in both. So the value is continuous whatever the units.
    """

    def __init__(self, start: float, segments: Sequence[Segment]) -> None:
        """Take the value before the first stretch, and the stretches in their order.

        Raises:
            SettingError: a stretch ends before the one before it, or has no shape or number.
        """
        self.start = finite(start, "start")
        self.segments = segments
        if not segments:
            raise SettingError("segments", ": there has to be one at least")
        self.ends = [
            _checked(segment, f"segments.{number}") for number, segment in enumerate(segments)
        ]
        for number, (before, end) in enumerate(pairwise(self.ends), 1):
            if before.unit == end.unit and end.length < before.length:
                raise SettingError.value(
                    f"segments.{number}.until",
                    segments[number].until,
                    f"has to be behind the segment before it, {segments[number - 1].until!r}",
                )
        values = [self.start, *(segment.to for segment in segments)]
        for number, (segment, (a, b)) in enumerate(zip(segments, pairwise(values), strict=True)):
            if segment.shape == "exponential" and not a * b > 0:
                raise SettingError.value(
                    f"segments.{number}.shape",
                    segment.shape,
                    f"goes between two values above 0, not from {a:g} to {b:g}; take another",
                )

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        value, begin = self.start, Span(0.0)
        for segment, end in zip(self.segments, self.ends, strict=True):
            position = end.of(progress)
            if position < end.length:
                began = _in_unit_of(end, begin, progress)
                part = (position - began) / (end.length - began) if end.length > began else 1.0
                return _between(value, segment.to, segment.shape, min(max(part, 0.0), 1.0))
            value, begin = segment.to, end
        return value


def _in_unit_of(end: Span, begin: Span, progress: Progress) -> float:
    """Return the start of a stretch, in the unit of its end."""
    if begin.unit == end.unit or not begin.length:
        return begin.length
    # The training is there or beyond, and so above 0.
    return begin.length * end.of(progress) / begin.of(progress)


def _between(a: float, b: float, shape: Shape, part: float) -> float:
    if shape == "exponential":
        return math.copysign(abs(a) ** (1 - part) * abs(b) ** part, a)
    gone = _GONE[shape](part)
    return a * (1 - gone) + b * gone


def _checked(segment: Segment, key: str) -> Span:
    finite(segment.to, f"{key}.to")
    if segment.shape not in get_args(Shape):
        one = ", ".join(get_args(Shape))
        raise SettingError.value(f"{key}.shape", segment.shape, f"has to be one of {one}")
    return span(segment.until, f"{key}.until")


@dataclass(frozen=True)
class Segments:
    """Go from value to value: the base of all other schedules here.

    Attributes:
        segments: the stretches in their order; behind the last the value stays.
        start: the value before the first.
    """

    segments: tuple[Segment, ...]
    start: float = 0.0
    kind: Literal["segments"] = "segments"

    def __post_init__(self) -> None:
        """Refuse values that make no course."""
        _ = self._course

    @cached_property
    def _course(self) -> Course:
        return Course(self.start, self.segments)

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        return self._course.at(progress)


def finite(value: float, key: str) -> float:
    """Parse a number of a key.

    Raises:
        SettingError: it is none, or not finite.
    """
    if not is_finite(value):
        raise SettingError.value(key, value, "has to be a finite number")
    return float(value)


def share(value: float, key: str) -> float:
    """Parse a share of a key, 0 to 1.

    Raises:
        SettingError: it is none.
    """
    if not 0 <= finite(value, key) <= 1:
        raise SettingError.value(key, value, "has to be a share, 0 to 1")
    return float(value)
