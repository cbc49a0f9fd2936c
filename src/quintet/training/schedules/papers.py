"""The schedules of DeepSeek-V3, DeepSeek-V2 and Zamba2, for trainings of any length.

What their reports give in tokens is here as the share of all their tokens. So with as many tokens
the numbers are theirs, and in a shorter training things happen at the same places.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar, Literal

from quintet.training.progress import Progress
from quintet.training.schedules.segments import Course, Segment, finite, share
from quintet.training.schedules.shapes import Rising

# Of all tokens, in billions: arXiv:2412.19437 §4.2 and arXiv:2405.04434 §3.1.2.
_V3, _V2 = 14_800, 8_100


@dataclass(frozen=True)
class DeepseekV3LearningRate(Rising):
    """DeepSeek-V3's: 14.8T tokens (arXiv:2412.19437 §4.2).

    Up in 2,000 steps to 2.2e-4, stay to 10T, a cosine to 2.2e-5 within 4.3T, stay for 333B, and
    7.3e-6 for the last 167B.

    Attributes:
        peak: the highest value; 2.2e-4 there.
        warmup: "2000 steps" there, of about 240,000.
    """

    _: KW_ONLY
    warmup: float | str = 0.008
    kind: Literal["deepseek-v3"] = "deepseek-v3"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        return [
            Segment(10_000 / _V3, self.peak, "constant"),
            Segment(14_300 / _V3, self.peak * 0.1, "cosine"),
            Segment(14_633 / _V3, self.peak * 0.1, "constant"),
            Segment(1.0, self.peak * (7.3e-6 / 2.2e-4), "constant"),
        ]


@dataclass(frozen=True)
class DeepseekV2LearningRate(Rising):
    """DeepSeek-V2's: up in 2,000 steps to 2.4e-4, times .316 at 60 and 90 % of the 8.1T tokens.

    arXiv:2405.04434 §3.1.2. V2-Lite's is at 4.2e-4 and falls at 80 and 90 %: kind "steps".

    Attributes:
        peak: the highest value; 2.4e-4 there.
        warmup: "2000 steps" there, of about 220,000.
    """

    _: KW_ONLY
    warmup: float | str = 0.009
    kind: Literal["deepseek-v2"] = "deepseek-v2"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        return [
            Segment(0.6, self.peak, "constant"),
            Segment(0.9, self.peak * 0.316, "constant"),
            Segment(1.0, self.peak * 0.316**2, "constant"),
        ]


@dataclass(frozen=True)
class Zamba2LearningRate(Rising):
    """Zamba2's two phases: a cosine over all but the end, then an annealing (arXiv:2411.15242).

    The annealing reads the best texts, and its rate falls fast: up again, and exponentially down.
    The report says so in words; the numbers here are ours.

    Attributes:
        peak: the highest value.
        warmup: how long it rises: a share of the training, or "2000 steps".
        annealing: the share of the training, counted from its end, that is the second phase.
        between: what is left of the peak where the first phase ends, as a share of it.
        again: to what share of the peak the second rises, in a twentieth of its length.
        end: what is left of the peak at the end, as a share of it.
    """

    _: KW_ONLY
    annealing: float = 0.1
    between: float = 0.5
    again: float = 0.75
    end: float = 0.01
    kind: Literal["zamba2"] = "zamba2"

    def then(self) -> Sequence[Segment]:
        """Return the stretches behind the rise."""
        begins = 1 - share(self.annealing, "annealing")
        return [
            Segment(begins, self.peak * share(self.between, "between"), "cosine"),
            Segment(begins + self.annealing / 20, self.peak * share(self.again, "again")),
            Segment(1.0, self.peak * share(self.end, "end"), "exponential"),
        ]


@dataclass(frozen=True)
class DeepseekV3PredictionWeight:
    """The weight λ of DeepSeek-V3's prediction loss: .3 for 10T tokens, then .1 (§4.2).

    Attributes:
        first: λ in the first 10T of 14.8T tokens.
        then: λ behind them.
    """

    first: float = 0.3
    then: float = 0.1
    _: KW_ONLY
    kind: Literal["deepseek-v3-prediction"] = "deepseek-v3-prediction"

    def __post_init__(self) -> None:
        """Refuse values that are no numbers."""
        finite(self.first, "first")
        finite(self.then, "then")

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        return self.first if progress.done < 10_000 / _V3 else self.then


@dataclass(frozen=True)
class DeepseekV3BiasSpeed:
    """The bias update speed γ of DeepSeek-V3: .001 for 14.3T of 14.8T tokens, then 0 (§4.2).

    Attributes:
        speed: γ, until it is 0.
    """

    speed: float = 0.001
    _: KW_ONLY
    kind: Literal["deepseek-v3-bias"] = "deepseek-v3-bias"

    def __post_init__(self) -> None:
        """Refuse values that are no numbers."""
        finite(self.speed, "speed")

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        return self.speed if progress.done < 14_300 / _V3 else 0.0


class Growing:
    """A batch that grows linearly in the tokens read, and then stays.

    Attributes:
        last: the batch it grows to, in whatever it is counted.
        first: what it begins with.
        until: the share of the training in which it grows.
    """

    last: float
    first: float
    until: ClassVar[float]

    @cached_property
    def _course(self) -> Course:
        return Course(finite(self.first, "first"), [Segment(self.until, finite(self.last, "last"))])

    def __post_init__(self) -> None:
        """Refuse values that are no numbers."""
        _ = self._course

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        return self._course.at(progress)


@dataclass(frozen=True)
class DeepseekV3Batch(Growing):
    """The batch of DeepSeek-V3: from 3,072 to 15,360 rows in the first 469B of 14.8T tokens (§4.2).

    The report says "gradually"; here linearly in the tokens that were read.

    Attributes:
        last: the batch it grows to, in whatever it is counted.
        first: what it begins with.
    """

    last: float = 15_360
    first: float = 3_072
    _: KW_ONLY
    kind: Literal["deepseek-v3-batch"] = "deepseek-v3-batch"
    until: ClassVar[float] = 469 / _V3


@dataclass(frozen=True)
class DeepseekV2Batch(Growing):
    """The batch of DeepSeek-V2: from 2,304 to 9,216 rows in the first 225B of 8.1T tokens.

    arXiv:2405.04434 §3.1.2; linearly in the tokens that were read.

    Attributes:
        last: the batch it grows to, in whatever it is counted.
        first: what it begins with.
    """

    last: float = 9_216
    first: float = 2_304
    _: KW_ONLY
    kind: Literal["deepseek-v2-batch"] = "deepseek-v2-batch"
    until: ClassVar[float] = 225 / _V2
