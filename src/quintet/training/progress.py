"""The progress of a training, the argument of all schedules."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a training at the start of a step.

    Attributes:
        step: how many steps of the optimiser were taken before this one.
        tokens: how many tokens these have read.
        done: the share of the whole training that they are, 0 to 1.
    """

    step: int
    tokens: int
    done: float
