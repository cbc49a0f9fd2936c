"""Mamba-2's mixer with gradients, keeping only its inputs for the backward pass.

Step by step, autograd keeps some fifty numbers for each channel and token. Here all between the
projections is computed again, which kernels do; the steps define it, and serve where none is.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.ssm import MixerWeights
from quintet.kernels.ssm_gradient import LANES, Learned, mix_texts, mix_texts_gradient
from quintet.ops.again import Rule, keeping_inputs, learn
from quintet.ops.mamba2 import mix_stepwise


class MixOptions(NamedTuple):
    """The options of mixing, without weights; see `MixerWeights`."""

    lengths: tuple[int, ...]
    num_groups: int
    dt_limits: tuple[float, float]
    eps: float


def mix_learning(projected: Tensor, weights: MixerWeights, lengths: Sequence[int]) -> Tensor | None:
    """Mix packed texts, or return None if it must be done stepwise.

    Shapes: projected (M, H·P + C + H) of all tokens, whose numbers in each text are `lengths`;
    returns (M, H·P).
    """
    learned = Learned(*weights[:6])
    if not _suits(learned, weights.num_groups) or not learn(projected, *learned):
        return None
    how = MixOptions(tuple(lengths), weights.num_groups, weights.dt_limits, weights.eps)
    rule = Rule(partial(_stepwise, how), partial(_compute, how), partial(_derive, how))
    return keeping_inputs(rule, projected, *learned)


def _suits(learned: Learned, num_groups: int) -> bool:
    inner = learned.norm.numel()
    state = (learned.taps.shape[0] - inner) // 2 // num_groups
    return inner // learned.D.numel() % LANES == 0 and state > 0 and state % LANES == 0


def _stepwise(how: MixOptions, projected: Tensor, *learned: Tensor | None) -> Tensor:
    own = Learned(*learned)  # type: ignore[arg-type]
    texts = torch.split(projected[None], list(how.lengths), dim=1)
    weights = MixerWeights(*own, *how[1:])
    mixed = [mix_stepwise(text, weights, None, None, None, chunk_size=64).out for text in texts]
    return torch.cat(mixed, dim=1)[0]


def _compute(how: MixOptions, projected: Tensor, *learned: Tensor | None) -> Tensor | None:
    mixed = mix_texts(projected.float().contiguous(), _wide(learned), **how._asdict())
    return None if mixed is None else mixed.to(projected.dtype)


def _derive(
    how: MixOptions, grad: Tensor, projected: Tensor, *learned: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    wide = projected.float().contiguous(), _wide(learned)
    found = mix_texts_gradient(grad.float().contiguous(), *wide, **how._asdict())
    return None if found is None else (found[0], *found[1])


def _wide(learned: Sequence[Tensor | None]) -> Learned:
    return Learned(*(None if x is None else x.float().contiguous() for x in learned))  # type: ignore[arg-type]
