"""Reversible tables between the tensors of a model and those on disk.

Module names equal checkpoint names, so that most tensors need no rule. Experts do: a model holds
the matrices of all experts of a layer in one tensor, a checkpoint holds one of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Piece", "StackExperts", "count_pieces", "pieces", "split_tensors"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StackExperts:
    """A tensor (E, rows, ...) whose slice e is the parts of expert e on top of each other.

    It is read in both directions: a tensor of the model is cut into views to be saved, and
    filled part by part, in whatever order they come, to be loaded.

    Attributes:
        stacked: how the name in the model ends, for example "experts.gate_up_proj".
        parts: how the names on disk end, "{}" standing for the expert; parts share the rows
            equally, in this order.
    """

    stacked: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk that fills a tensor of the model, or one expert's rows of it."""

    name: str
    shape: Shape
    place: tuple[int, slice] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the model's tensor that this piece fills."""
        return tensor if self.place is None else tensor[self.place]


def pieces(name: str, shape: Shape, rules: Sequence[StackExperts]) -> list[Piece]:
    """List the tensors on disk that fill a tensor of the model."""
    rule = _rule(name, rules)
    if rule is None:
        return [Piece(name, shape)]
    prefix = name.removesuffix(rule.stacked)
    rows, rest = divmod(shape[1], len(rule.parts))
    assert not rest, f"{name} {shape} is not {len(rule.parts)} parts of equal height"
    return [
        Piece(
            prefix + part.format(expert),
            (rows, *shape[2:]),
            (expert, slice(index * rows, (index + 1) * rows)),
        )
        for expert in range(shape[0])
        for index, part in enumerate(rule.parts)
    ]


def count_pieces(name: str, shape: Shape, rules: Sequence[StackExperts]) -> int:
    """Count the tensors on disk that fill a tensor of the model, without listing them."""
    rule = _rule(name, rules)
    return 1 if rule is None else shape[0] * len(rule.parts)


def _rule(name: str, rules: Sequence[StackExperts]) -> StackExperts | None:
    for rule in rules:
        if name == rule.stacked or name.endswith("." + rule.stacked):
            return rule
    return None


def split_tensors(
    tensors: Mapping[str, Tensor], rules: Sequence[StackExperts]
) -> Iterator[tuple[str, Tensor]]:
    """Name a model's tensors as they are on disk; experts are views, nothing is copied."""
    for name, tensor in tensors.items():
        for piece in pieces(name, tuple(tensor.shape), rules):
            yield piece.name, piece.of(tensor)
