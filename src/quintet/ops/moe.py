"""Mixtures of experts: each token goes through a few of many MLPs.

`apply_experts` has three forms that compute the same sum, for a token's A experts e with shares w:
Σ_a w_a · down_e(act(gate_e(x)) · up_e(x)). The terms are added in float32 or wider. Backends go
before them where they can.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.errors import UnsupportedBackendError
from quintet.kernels.matrix import Matrix
from quintet.kernels.routing import Rules
from quintet.ops.activations import Activation, gate_by
from quintet.ops.again import learn
from quintet.ops.experts_learning import learning_experts
from quintet.ops.grouped import grouped_linear
from quintet.ops.one_pass import choose_experts, gated_mlp
from quintet.ops.transforms import recorded

# Up to so many tokens, a device reads matrices for longer than it multiplies.
FEW_TOKENS = 256


def top_experts(logits: Tensor, A: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return the A most probable experts and their shares, (N, A) each.

    Shares are probabilities of a softmax over all experts, in the dtype of `logits` (N, E);
    `normalise` makes those chosen sum to one.
    """
    output = choose_experts(logits, Rules(active=A, normalise=normalise))
    return _top_experts(logits, A, normalise=normalise) if output is None else output


def _top_experts(logits: Tensor, A: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    # In float32: in bfloat16 many probabilities round to the same number, and others are chosen.
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    indices = probabilities.detach().topk(A, dim=-1).indices
    return indices, expert_shares(probabilities, indices, normalise=normalise).to(logits.dtype)


def expert_shares(probabilities: Tensor, indices: Tensor, *, normalise: bool) -> Tensor:
    """Return the probabilities (N, A) of the chosen experts, optionally normalised."""
    shares = probabilities.gather(1, indices)
    return shares / shares.sum(dim=-1, keepdim=True) if normalise else shares


def switch_balance_loss(router_logits: Sequence[Tensor], A: int, mask: Tensor) -> Tensor:
    """Return the load-balancing loss of all layers: E · Σ_e f_e · P_e.

    f_e is how many of a token's A choices fall on expert e, P_e its probability, both averaged
    over the tokens of every layer (Switch Transformer, arXiv:2101.03961, eq. 4-6, with f summed
    over the choices). It is A where all experts are equally probable.
    Shapes: router_logits (B·T, E) of each layer; mask (B, T), 0 for tokens that do not count.
    """
    counted = mask.reshape(-1, 1).to(router_logits[0].device, torch.float32)
    E = router_logits[0].shape[-1]
    chosen = probable = torch.zeros(E, dtype=torch.float32, device=counted.device)
    for logits in router_logits:
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        indices = probabilities.topk(A, dim=-1).indices
        hits = torch.zeros_like(probabilities).scatter(1, indices, 1.0)
        chosen = chosen + (hits * counted).sum(dim=0)
        probable = probable + (probabilities * counted).sum(dim=0)
    tokens = (len(router_logits) * counted.sum()).clamp(min=1)
    return E * torch.dot(chosen / tokens, probable / tokens)


def apply_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Sum each token's experts with their weights, in the fastest form here.

    Shapes: x (N, C); indices and weights (N, A); gate_up (E, 2F, C), the gate's rows first;
    down (E, C, F); returns (N, C).

    Raises:
        UnsupportedBackendError: torch.jit traces, which would hold for these tokens' experts alone.
    """
    if recorded() and not torch.compiler.is_compiling():
        raise UnsupportedBackendError(
            "torch.jit.trace cannot follow which tokens go to which experts; use torch.export"
        )
    if act is F.silu:
        gate, up = (Matrix(half) for half in gate_up.chunk(2, dim=1))
        output = gated_mlp(x, gate, up, Matrix(down), indices, weights)
        if output is not None:
            return output
        return silu_experts(x, indices, weights, gate_up, down)
    return _in_form(x, indices, weights, gate_up, down, act)


@operation("experts")
def silu_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Sum each token's experts with SiLU; shapes as in `apply_experts`."""
    return _in_form(x, indices, weights, gate_up, down, F.silu)


def _in_form(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    form = looped_experts
    learns = torch.is_grad_enabled() and gate_up.requires_grad
    if x.device.type != "cpu" and not learns and len(x) <= FEW_TOKENS:
        # A device had to be waited for to know whose tokens are whose.
        form = gathered_experts if indices.numel() <= gate_up.shape[0] else crossed_experts
    elif torch.compiler.is_compiling():
        form = grouped_experts
    elif learns:
        # In the loop, the gradient of each expert's slice would be as large as the whole stack.
        if act is F.silu and learn(x, weights, gate_up, down):
            return learning_experts(x, indices, weights, gate_up, down)
        form = grouped_experts
    return form(x, indices, weights, gate_up, down, act)


def looped_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Loop over the experts that were chosen, copying no weights."""

    def run(expert: int, rows: Tensor) -> Tensor:
        return F.linear(gated(F.linear(rows, gate_up[expert]), act), down[expert])

    return each_hit_expert(x, indices, weights, gate_up.shape[0], run)


def each_hit_expert(
    x: Tensor, indices: Tensor, weights: Tensor, E: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum `run` over the tokens of each chosen expert, with their weights."""
    order, counts = _by_expert(indices, E)
    tokens = order // indices.shape[1]
    shares = weights.flatten()[order]
    out = _zeros(x)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            rows, share = tokens[start : start + count], shares[start : start + count, None]
            out.index_add_(0, rows, (run(expert, x[rows]) * share).to(out.dtype))
            start += count
    return out.to(x.dtype)


def grouped_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Sort tokens by expert and use grouped products; no shape depends on the routing."""
    order, counts = _by_expert(indices, gate_up.shape[0])
    tokens = order // indices.shape[1]
    output = grouped_linear(x[tokens], gate_up, counts)
    output = grouped_linear(gated(output, act), down, counts)
    output = output * weights.flatten()[order, None]
    out = _zeros(x)
    return out.index_add(0, tokens, output.to(out.dtype)).to(x.dtype)


def gathered_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Copy each token's expert matrices, for few tokens.

    No shape depends on the routing and nothing is read back from the device, so that a step can
    be captured in a graph.
    """
    out = _zeros(x)
    for expert, share in zip(indices.unbind(dim=1), weights.unbind(dim=1), strict=True):
        output = gated(torch.bmm(gate_up[expert], x[:, :, None]).squeeze(-1), act)
        output = torch.bmm(down[expert], output[:, :, None]).squeeze(-1)
        out = out + output * share[:, None]
    return out.to(x.dtype)


def crossed_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Run all experts on all tokens, and select.

    Where most experts are chosen by some token, all are read anyway, and reading is what such a
    product takes its time for. As in `gathered_experts`, nothing depends on the routing.
    """
    wide = x.expand(gate_up.shape[0], -1, -1)
    mapped = torch.bmm(gated(torch.bmm(wide, gate_up.mT), act), down.mT)  # (E, N, C)
    tokens = torch.arange(len(x), dtype=torch.long, device=x.device)
    out = _zeros(x)
    for expert, share in zip(indices.unbind(dim=1), weights.unbind(dim=1), strict=True):
        out = out + mapped[expert, tokens] * share[:, None]
    return out.to(x.dtype)


def _by_expert(indices: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Return the permutation that sorts choices by expert, and the count per expert."""
    flat = indices.flatten()
    # Not bincount: the length of its result depends on the data.
    counts = torch.zeros(E, dtype=torch.long, device=flat.device)
    return flat.argsort(stable=True), counts.scatter_add(0, flat, torch.ones_like(flat))


def gated(gate_up: Tensor, act: Activation) -> Tensor:
    """Return act(gate) · up; gate_up (..., 2F), the gate first."""
    return gate_by(act, *gate_up.chunk(2, dim=-1))


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
