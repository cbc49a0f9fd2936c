"""How far a training is: what everything that changes along the way is a function of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is when a step begins.

    Attributes:
        step: how many steps of the optimiser were taken before this one.
        tokens: how many tokens these have read.
        done: the share of the whole training that they are, 0 to 1.
    """

    step: int
    tokens: int
    done: float
