"""Packed texts and their memory, as kernels see them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """The texts of one forward, one behind the other in a packed row of N tokens.

    Attributes:
        n: how many there are.
        most: how many tokens one has at the most; all have so many where `ends` is None.
        ends: (n + 1,) int32, before which token each text begins, and N; None for a rectangle.
        rows: (n,) int32, in which row of memory what is kept of a text lies, no row twice; below 0
            is nowhere: it begins with zeros, and nothing is kept. None if text i has row i.
        counts: (n,) int64, how many tokens of a rectangle's row are real, the rest being padding
            behind; None for all.
    """

    n: int
    most: int
    ends: Tensor | None = None
    rows: Tensor | None = None
    counts: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among these fields."""
        return tuple(x for x in (self.ends, self.rows, self.counts) if x is not None)
