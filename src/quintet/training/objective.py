"""Interface of objectives: sums, and the counts they are divided by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from quintet.modeling.base import PreTrainedModel
from quintet.training.batch import Batch
from quintet.training.progress import Progress


@dataclass(frozen=True, slots=True)
class Term:
    """A part of what is minimised: its mean is `sum` over the counts of all parts of a step.

    Attributes:
        sum: a scalar that gradients flow through.
        count: over how many labels, texts, pairs … it was summed; what `Objective.counts` says.
        weight: the factor of the mean in what is minimised; 0 for what is only told.
    """

    sum: Tensor
    count: int
    weight: float = 1.0


class Objective(Protocol):
    """Interface of an objective.

    A step reads its batch in parts. The loop first adds up `counts` over all of them, then runs
    `terms` for each and minimises Σ weight · sum / (the count of the whole step), so that how a
    step is cut into parts, or spread over processes, does not change what is learned.
    """

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of items that each term is summed over, by its name; runs no model."""
        ...

    def terms(self, model: PreTrainedModel, batch: Batch, at: Progress) -> Mapping[str, Term]:
        """Run the model over a part of a step, and return the terms by their names."""
        ...


@runtime_checkable
class StepObjective(Objective, Protocol):
    """An objective that has to have seen all of a step before its first part is learned from."""

    def of_step(
        self,
        model: PreTrainedModel,
        parts: Sequence[Batch],
        at: Progress,
        summed: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> Objective:
        """Return the objective of a step from its parts; called if there are several.

        Where other processes have other parts of the step, `summed` is the sum over all of them.
        """
        ...
