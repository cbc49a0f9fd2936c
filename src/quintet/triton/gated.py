"""Gated MLPs, one for all tokens or experts a token chose: down(silu(gate x) · up x)."""

from torch import Tensor

from quintet.kernels.linear import batch_invariant
from quintet.kernels.matrix import Matrix
from quintet.triton.grouped import grouped_experts
from quintet.triton.launching import takes
from quintet.triton.vectors import gate_vectors, map_vectors
from quintet.triton.weights import KernelWeight, kernel_weight

# So many vectors of one MLP read it from the cache by themselves.
FEW = 2
# Beyond so many tokens, or choices for each of E experts, experts are read once for all of them.
FEW_TOKENS, FEW_CHOICES = 16, 0.5


def gated(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    indices: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor | None:
    """Return Σ share · down(silu(gate x) · up x) over a token's experts; None if it cannot.

    Shapes: x (..., C); gate and up (F, C), down (C, F), each without a bias. With `indices` (N, A)
    and `shares` (N, A), x is (N, C) and weights are (E, ...). Indices have to be all from 0 to
    E - 1.
    """
    found = _found(x, gate, up, down, indices, shares)
    if found is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if indices is None or shares is None:
        return _of_one(rows, *found).view(x.shape) if len(rows) <= FEW else None
    E = len(gate.weight)
    few = len(x) <= FEW_TOKENS and indices.numel() <= FEW_CHOICES * E and not batch_invariant()
    run = _by_id if few else grouped_experts
    return run(rows, *found, indices.contiguous(), shares.contiguous())


def silu_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor | None:
    """Sum each token's experts with SiLU, by their weights; None if kernels do not apply.

    Shapes: x (N, C); indices and weights (N, A); gate_up (E, 2F, C); down (E, C, F).
    """
    gate, up = (Matrix(half) for half in gate_up.chunk(2, dim=1))
    return gated(x, gate, up, Matrix(down), indices, weights)


def _found(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    indices: Tensor | None,
    shares: Tensor | None,
) -> tuple[KernelWeight, KernelWeight, KernelWeight] | None:
    """Return the weights as kernels read them; None if something does not fit."""
    given = [t for m in (gate, up, down) for t in (m.weight, m.scale, m.offset)] + [indices, shares]
    if not x.ndim or not x.numel() or x.stride(-1) != 1:
        return None
    if not takes(x, *(t for t in given if t is not None)):
        return None
    if any(one.bias is not None for one in (gate, up, down)) or gate.weight.ndim < 2:
        return None
    F, C, E = gate.weight.shape[-2], x.shape[-1], None
    if indices is not None:
        fits = x.ndim == indices.ndim == 2 and len(x) == len(indices)
        if not fits or shares is None or shares.shape != indices.shape or gate.weight.ndim != 3:
            return None
        E = len(gate.weight)
    first, second = (kernel_weight(one, F, C, x.dtype, E) for one in (gate, up))
    last = kernel_weight(down, C, F, x.dtype, E)
    if first is None or second is None or last is None:
        return None
    alike = first.steps == second.steps and first.constants == second.constants
    same = (first.scale.dtype, first.weight.dtype) == (second.scale.dtype, second.weight.dtype)
    return (first, second, last) if alike and same else None


def _of_one(x: Tensor, gate: KernelWeight, up: KernelWeight, down: KernelWeight) -> Tensor:
    inside = x.new_empty(len(x), gate.weight.shape[-2])
    gate_vectors(x, gate, up, inside, None, len(x))
    output = x.new_empty(x.shape)
    map_vectors(inside, down, None, output)
    return output


def _by_id(
    x: Tensor,
    gate: KernelWeight,
    up: KernelWeight,
    down: KernelWeight,
    indices: Tensor,
    shares: Tensor,
) -> Tensor:
    inside = x.new_empty(indices.numel(), gate.weight.shape[-2])
    gate_vectors(x, gate, up, inside, indices, indices.numel())
    output = x.new_empty(x.shape)
    map_vectors(inside, down, None, output, indices, shares)
    return output
