"""A norm of a group of channels that several processes have parts of."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.layers.mamba2 import GatedRMSNorm
from quintet.parallel.regions import copied, reduced


@dataclass(frozen=True, slots=True, eq=False)
class SpreadNorm:
    """The forward of a norm whose channels are a part of one group.

    The sum of squares is one number a token, and passes between the processes in float32.
    """

    norm: GatedRMSNorm
    group: dist.ProcessGroup
    index: int
    count: int

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise x · silu(z), (B, T, channels) of this process; return the dtype of `z`."""
        norm = self.norm
        own, size = norm.weight.shape[0], norm.group_size
        dtype = torch.promote_types(z.dtype, torch.float32)
        gated = x.to(dtype) * F.silu(z.to(dtype))
        # A column for each group: all processes add up at once, and each reads its own.
        groups = self.count * own // size
        mine = self.index * own // size
        squares = gated.square().sum(dim=-1, keepdim=True)
        columns = F.pad(squares, (mine, groups - 1 - mine))
        # Every process goes on with the sum: it learns from what all of them do.
        total = copied(reduced(columns, self.group), self.group)[..., mine, None]
        scale = (total / size + norm.variance_epsilon).rsqrt()
        # As `rms_norm` does: rounded before the scale, in the scale's dtype or a wider one.
        return (gated * scale * norm.weight.to(dtype)).to(z.dtype)
