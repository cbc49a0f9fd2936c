"""A place that a cache can return to."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Copies of recurrent states at one place.

    Attributes:
        lengths: (B,) how many tokens each row has there.
        contents: each layer's window and state; None without one, or while it is empty.
    """

    lengths: Tensor
    contents: tuple[tuple[Tensor, Tensor] | None, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the copies."""
        return sum(x.nbytes for content in self.contents if content for x in content)
