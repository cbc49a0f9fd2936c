"""Compares the tensors a model expects with those of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quintet.checkpoint.header import TensorInfo
from quintet.errors import CheckpointError, listed

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor with another shape."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True, slots=True)
class Difference:
    """The missing, unused and mismatched tensors of a checkpoint."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[Mismatch]
    _shapes: Mapping[str, Shape] = field(repr=False, compare=False)

    def raise_if_incomplete(self, where: str) -> None:
        """Raise if a parameter would be left without values.

        Tensors that the model has no use for are no error, but help to understand one.

        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        if not self.missing and not self.mismatched:
            return
        parts = [f"{where} does not fit the model"]
        if self.missing:
            lines = [f"{name}: expected {_written(self._shapes[name])}" for name in self.missing]
            parts.append(f"{len(self.missing)} missing:\n{listed(lines)}")
        if self.mismatched:
            lines = [
                f"{item.name}: expected {_written(item.expected)}, found {_written(item.found)}"
                for item in self.mismatched
            ]
            parts.append(f"{len(self.mismatched)} of another shape:\n{listed(lines)}")
        if self.unexpected:
            lines = [f"{name}: found {_written(self._shapes[name])}" for name in self.unexpected]
            parts.append(f"{len(self.unexpected)} that the model does not use:\n{listed(lines)}")
        remedy = "Check that config.json belongs to these weights and the class to its model_type"
        raise CheckpointError("\n".join([*parts, remedy]))


def compare(expected: Mapping[str, Shape], found: Mapping[str, TensorInfo]) -> Difference:
    """Compare the names and shapes that a model expects with those of a checkpoint."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    mismatched = [
        Mismatch(name, tuple(shape), found[name].shape)
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    shapes = {name: tuple(expected[name]) for name in missing}
    shapes |= {name: found[name].shape for name in unexpected}
    return Difference(missing, unexpected, mismatched, shapes)


def _written(shape: Shape) -> str:
    return str(list(shape))
