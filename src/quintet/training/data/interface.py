"""The interface of data to training and evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quintet.training.batch import Batch
from quintet.training.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text that is not learned from, to measure a model by.

    Attributes:
        input_ids: (T,), what the text begins with in training included.
        labels: (T,) the ids where they stand, -100 where nothing would be learned.
        bytes: how many bytes of UTF-8 the text has; 0 where only a part of it is scored.
        name: where it comes from.
    """

    input_ids: Tensor
    labels: Tensor
    bytes: int
    name: str


class Data(Protocol):
    """Batches by the number of their step: nothing is kept between steps, so nothing is saved."""

    @property
    def context(self) -> int:
        """The most tokens that a row ever has."""
        ...

    @property
    def tokens(self) -> int | None:
        """The number of tokens of one pass over everything, if it is known."""
        ...

    @property
    def documents(self) -> int | None:
        """The number of documents, conversations or pairs, if it is known."""
        ...

    @property
    def paired(self) -> bool:
        """Whether rows are pairs of answers, of which the first half of a batch is preferred."""
        ...

    @property
    def held_out(self) -> Sequence[Document]:
        """The held-out documents, read from the disk on demand."""
        ...

    def parts(
        self, at: Progress, count: int = 1, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield the rows of the step that begins here, cut into at most `count` parts.

        Which rows these are is a function of the seed and `at.step`, and of `at.done` where
        weights or contexts change along the way; not of `count`. Of n shares of them, as many
        processes read, the i-th is `share=(i, n)`; all have equally many parts.

        Raises:
            ConfigError: there are fewer rows than shares.
        """
        ...

    def fingerprint(self) -> str:
        """Return a digest that is equal if and only if equal steps read equal tokens."""
        ...
