"""Numbers that change along a training: learning rates, weights of losses, shares of texts."""

from typing import Protocol

from quintet.training.progress import Progress


class Schedule(Protocol):
    """A number as a function of how far the training is."""

    def at(self, progress: Progress) -> float:
        """Return the number in the step that begins here."""
        ...


class Constant:
    """A number that stays."""

    def __init__(self, value: float) -> None:
        self.value = value

    def at(self, progress: Progress) -> float:
        """Return the number."""
        return self.value
