"""Assigns a format to each matrix of a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from quintet.quantization.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class Scheme:
    """The format of each kind of matrix; None leaves it unquantised.

    Attributes:
        weights: of the layers' linear maps and experts.
        head: of the output head, and of the embedding where the two are one.
        skip: parts of paths whose modules stay as they are.
        compute_dtype: what inputs are converted to; None for no change.
        special: the formats of matrices that have one of their own, by a part of their names or
            parts in a row: "down_proj", "layers.3.self_attn.v_proj", "experts.gate_up_proj". The
            longest that fits counts.
        formats: the format of each matrix by its name, in place of all the others; what it does not
            name stays as it is, and embeddings that it names are quantised too.
    """

    weights: WeightFormat | None
    head: WeightFormat | None = None
    skip: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    special: Mapping[str, WeightFormat] = field(default_factory=lambda: MappingProxyType({}))
    formats: Mapping[str, WeightFormat] | None = None

    def of(self, weight: str, usual: WeightFormat | None) -> WeightFormat | None:
        """Return a matrix's format by name; `usual` is its kind's."""
        if self.formats is not None:
            return self.formats.get(weight)
        if not self.special or usual is None:
            return usual
        return next((self.special[n] for n in _names(weight) if n in self.special), usual)


def _names(path: str) -> Iterator[str]:
    """Yield all runs of components of a path, longest first."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            yield ".".join(parts[start : start + length])


def is_named(path: str, names: Sequence[str]) -> bool:
    """Return whether a path contains one of the names as a run of components."""
    return any(f".{name}." in f".{path}." for name in names)
