"""Settings of balance losses."""

from collections.abc import Mapping
from typing import Protocol

from quintet.training.balance.routing import Routing
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.progress import Progress


class BalanceLoss(Protocol):
    """A loss, or several, of experts that do not get the same; a part of an objective."""

    @property
    def of_whole_step(self) -> bool:
        """Whether it needs the loads of all parts of a step, `Routing.loads`, before the first."""
        ...

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of items that each term is summed over, by its name; runs no model."""
        ...

    def terms(self, routing: Routing, at: Progress) -> Mapping[str, Term]:
        """Return the terms by their names."""
        ...
