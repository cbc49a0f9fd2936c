"""Inputs in an order of their own, so that those of a group are neighbours."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.parallel.placement import Shard
from quintet.quantization.formats import Parts, Shape, TensorSpec, WeightFormat

ORDER = "_order"


@dataclass(frozen=True)
class OrderedFormat(WeightFormat):
    """Another format, of a matrix whose columns are sorted; inputs are sorted before the product.

    What GPTQ calls act-order: it quantises the columns that matter first.

    Attributes:
        inner: the format of the sorted matrix.
    """

    inner: WeightFormat

    @property
    def name(self) -> str:
        """What it is called where people read it."""
        return f"{self.inner.name}, ordered"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part; the last says which column each place is of."""
        return {**self.inner.parts(shape), ORDER: TensorSpec(shape[-1:], torch.int32)}

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return what of each part belongs to the shard of a matrix; None for some columns.

        Columns that are neighbours are of many groups, of which each would be there in part.
        """
        columns = len(shard.shape) - 1
        inner = None if columns in shard.ranges else self.inner.shards(shard)
        return None if inner is None else {**inner, ORDER: Shard(shard.shape[-1:], {})}

    def alone(self, shard: Shard) -> bool:
        """Tell whether the shard of a matrix, encoded, is the same shard of the encoded matrix."""
        return self.shards(shard) is not None and self.inner.alone(shard)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts, in the order it has."""
        order = torch.arange(weight.shape[-1], dtype=torch.int32, device=weight.device)
        return {**self.inner.encode(weight), ORDER: order}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the parts stand for."""
        places = torch.empty_like(parts[ORDER])
        places[parts[ORDER]] = torch.arange(
            shape[-1], dtype=places.dtype, device=parts[ORDER].device
        )
        return self.inner.decode(parts, shape, dtype)[..., places]

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        """Return x wᵀ + b; x (..., I)."""
        return self.inner.linear(x[..., parts[ORDER]], parts, shape, bias)
