"""Formats with permuted columns (GPTQ's act-order)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import CheckpointError
from quintet.parallel.placement import Shard
from quintet.quantization.formats import Parts, Shape, TensorSpec, WeightFormat

ORDER = "_order"


@dataclass(frozen=True)
class OrderedFormat(WeightFormat):
    """Another format with sorted columns; inputs are permuted before the product.

    What GPTQ calls act-order: it quantises the columns that matter first.

    Attributes:
        inner: the format of the sorted matrix.
    """

    inner: WeightFormat

    @property
    def name(self) -> str:
        return f"{self.inner.name}, ordered"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part; the last is the permutation."""
        return {**self.inner.parts(shape), ORDER: TensorSpec(shape[-1:], torch.int32)}

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return the shard of each part, or None for some columns.

        Columns that are neighbours are of many groups, of which each would be there in part.
        """
        columns = len(shard.shape) - 1
        inner = None if columns in shard.ranges else self.inner.shards(shard)
        return None if inner is None else {**inner, ORDER: Shard(shard.shape[-1:], {})}

    def alone(self, shard: Shard) -> bool:
        return self.shards(shard) is not None and self.inner.alone(shard)

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Encode a matrix with its columns in the given order."""
        order = torch.arange(weight.shape[-1], dtype=torch.int32, device=weight.device)
        return {**self.inner.encode(weight, gram), ORDER: order}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        places = torch.empty_like(parts[ORDER])
        places[parts[ORDER]] = torch.arange(
            shape[-1], dtype=places.dtype, device=parts[ORDER].device
        )
        return self.inner.decode(parts, shape, dtype)[..., places]

    def checked(self, weight: str, parts: Parts, shape: Shape) -> Parts:
        """Return the parts, if the permutation is one.

        Raises:
            CheckpointError: it is none, or other parts are damaged.
        """
        found, columns = super().checked(weight, parts, shape), shape[-1]
        order = found[ORDER].to(torch.long)
        places = torch.arange(columns, device=order.device, dtype=torch.long)
        if not torch.equal(order.sort().values, places):
            raise CheckpointError(
                f"{weight + ORDER} has to name each of {columns} inputs once, and does not; the "
                "file is damaged, fetch it again"
            )
        return found

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        return self.inner.linear(x[..., parts[ORDER]], parts, shape, bias)
