"""Losses of a linear head computed in tiles, without materialising the logits.

A head with weight W (V, C) and bias b gives token n with state h the logits z = W h + b. All that
losses of single ids read of them are three numbers a token,

    log p(id) = z_id - lse,    lse = log Σ_v exp z_v,    1/V Σ_v z_v,

and the gradient of a loss that has g, γ and σ as its derivatives by these is, before the head,

    dz_v = g · ([v = id] - p_v) + γ · p_v + σ / V,    p_v = exp(z_v - lse),

so that both passes go over z by tiles, of some tokens and some ids: the first keeps the largest
logit and the sum of the exponentials, the second makes the tile again. Logits that are one tile are
kept. Where W is spread over processes, each goes over its own rows, and they join these sums.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.transforms import recorded, transformed

# How many numbers a tile has, and how many tokens at most: what caches of CPUs hold, and elsewhere
# what keeps a device busy.
TILE = {"cpu": (1 << 22, 1 << 11)}
LARGE_TILE = (1 << 26, 1 << 13)


class LogitSums(NamedTuple):
    """The statistics of the logits of N tokens that losses need, each (N,) in float32.

    Attributes:
        log_prob: the logarithm of the probability of the token's id.
        log_sum: log Σ_v exp z_v.
        mean: 1/V Σ_v z_v; None if nobody asked for it.
    """

    log_prob: Tensor
    log_sum: Tensor
    mean: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "LogitSums":
        """Apply a function to each field."""
        mean = None if self.mean is None else function(self.mean)
        return LogitSums(function(self.log_prob), function(self.log_sum), mean)


class OtherShards(Protocol):
    """The processes with the other rows of a head."""

    @property
    def start(self) -> int:
        """The first id of this process."""
        ...

    @property
    def size(self) -> int:
        """V, the number of all ids."""
        ...

    def joined(self, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce largest logit (N,) and sums (3, N) over all processes.

        The first of the sums is of exp(z - largest), and belongs to the largest that is given.
        """
        ...


def logit_sums(logits: Tensor, ids: Tensor, *, mean: bool = False) -> LogitSums:
    """Compute the statistics for losses from logits (..., V) and ids (...); the definition."""
    logits = logits.to(torch.float32)
    log_sum = logits.logsumexp(dim=-1)
    log_prob = F.log_softmax(logits, dim=-1).gather(-1, ids[..., None])[..., 0]
    return LogitSums(log_prob, log_sum, logits.mean(dim=-1) if mean else None)


def linear_sums(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    mean: bool = False,
    others: OtherShards | None = None,
) -> LogitSums:
    """Compute what losses need from hidden·Wᵀ + b in tiles.

    In programs that are recorded, and under `torch.func`, they are: those know no rule for this.

    Shapes: hidden (N, C), weight (V, C), ids (N,) from 0 to V - 1, bias (V,). With other processes,
    weight and bias have this one's rows, and the gradient of the states is this one's part of it.
    """
    if others is None and (recorded() or transformed()):
        return logit_sums(F.linear(hidden, weight, bias), ids, mean=mean)
    dtype = _dtype(hidden)
    # Products in other dtypes than theirs are told so: the gradient may be made under autocast too.
    with torch.autocast(hidden.device.type, enabled=False):
        found = _LinearSums.apply(hidden, weight, bias, ids, mean, dtype, others)  # type: ignore[no-untyped-call]
        return LogitSums(*found)


def _dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of products, following autocast."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@dataclass(frozen=True, slots=True)
class _Head:
    """One tile of a head.

    Attributes:
        ids: which.
        weight: (v, C), in the dtype that products are computed in.
        bias: (v,) or None.
    """

    ids: slice
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, v) of states (n, C), in float32; may be overwritten."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).to(torch.float32)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether ids (n,) are in this tile, and their columns (n, 1)."""
        place = ids - self.ids.start
        inside = (place >= 0) & (place < len(self.weight))
        return inside[:, None], place.clamp_(0, len(self.weight) - 1)[:, None]


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[_Head, list[slice]]]:
    """Yield tiles of the head and of the tokens."""
    numbers, tokens = TILE.get(hidden.device.type, LARGE_TILE)
    rows = list(_parts(len(hidden), tokens))
    for ids in _parts(len(weight), numbers // max(1, min(len(hidden), tokens))):
        own = None if bias is None else bias[ids].to(dtype)
        yield _Head(ids, weight[ids].to(dtype), own), rows


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a·b to a total in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class _LinearSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mean: bool,
        dtype: torch.dtype,
        others: OtherShards | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        size = len(weight) if others is None else others.size
        ids = ids if others is None else ids - others.start
        largest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        exponentials, chosen, sums = (torch.zeros_like(largest) for _ in range(3))
        for head, parts in _tiles(hidden, weight, bias, dtype):
            for rows in parts:
                z = head.logits(hidden[rows])
                inside, place = head.places(ids[rows])
                chosen[rows] += z.gather(1, place).masked_fill_(~inside, 0)[:, 0]
                if mean:
                    sums[rows] += z.sum(dim=1)
                before = largest[rows]
                after = torch.maximum(before, z.amax(dim=1))
                exponentials[rows] *= (before - after).exp_()
                exponentials[rows] += z.sub_(after[:, None]).exp_().sum(dim=1)
                largest[rows] = after
        # The one tile there is, if it is no more than that.
        nonempty = len(hidden) and len(weight)
        whole = z if nonempty and z.shape == (len(hidden), len(weight)) else None
        if others is not None:
            before = largest
            largest, joined = others.joined(before, torch.stack((exponentials, chosen, sums)))
            exponentials, chosen, sums = joined
            whole = None if whole is None else whole.mul_((before - largest).exp_()[:, None])
        ctx.save_for_backward(hidden, weight, bias, ids, largest, exponentials, whole)
        ctx.mean, ctx.dtype, ctx.size, ctx.spread = mean, dtype, size, others is not None
        log = exponentials.log()
        return (chosen - largest) - log, largest + log, sums / size if mean else None

    @staticmethod
    def backward(
        ctx: Any, of_log_prob: Tensor, of_log_sum: Tensor, of_mean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        given, needed = (of_log_prob, of_log_sum, of_mean), ctx.needs_input_grad[:3]
        # Here, too: a caller may be in autocast on the way back alone.
        with torch.autocast(of_log_prob.device.type, enabled=False):
            if torch.is_grad_enabled() and ctx.spread:
                raise InputError(
                    "a loss of a head that is spread over processes is derived once, and not twice"
                )
            make = _derivable_gradients if torch.is_grad_enabled() else _gradients
            return *make(ctx, needed, *given), None, None, None, None


Needed = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    ctx: Any, needed: Needed, of_log_prob: Tensor, of_log_sum: Tensor, of_mean: Tensor | None
) -> Gradients:
    hidden, weight, bias, ids, largest, exponentials, whole = ctx.saved_tensors
    dtype = ctx.dtype
    f32 = torch.float32
    of_p = (of_log_sum - of_log_prob) / exponentials
    of_ids = torch.zeros_like(of_p)
    d_hidden = torch.zeros_like(hidden, dtype=f32) if needed[0] else None
    d_weight = torch.empty_like(weight) if needed[1] else None
    d_bias = torch.empty_like(bias) if needed[2] else None
    for head, parts in _tiles(hidden, weight, bias, dtype):
        own_weight = torch.zeros_like(head.weight, dtype=f32) if needed[1] else None
        own_bias = head.weight.new_zeros(len(head.weight), dtype=f32) if needed[2] else None
        for rows in parts:
            if whole is None:
                z = head.logits(hidden[rows]).sub_(largest[rows, None]).exp_()
                z.mul_(of_p[rows, None])
            else:
                z = whole * of_p[:, None]
            if of_mean is not None:
                z += of_mean[rows, None] / ctx.size
            inside, place = head.places(ids[rows])
            own = z.gather(1, place)
            of_own = torch.where(inside, own + of_log_prob[rows, None], own)
            of_ids[rows] += torch.where(inside, of_own, 0)[:, 0]
            d = z.scatter_(1, place, own.masked_fill(inside, 0)).to(dtype)
            if d_hidden is not None:
                _add_product(d_hidden[rows], d, head.weight)
            d.scatter_(1, place, of_own.to(dtype))
            if own_bias is not None:
                own_bias += d.sum(dim=0, dtype=f32)
            if own_weight is not None:
                _add_product(own_weight, d.T, hidden[rows].to(dtype))
        if d_weight is not None and own_weight is not None:
            d_weight[head.ids] = own_weight
        if d_bias is not None and own_bias is not None:
            d_bias[head.ids] = own_bias
    if d_hidden is not None:
        # Apart, since beside it what thousands of unlikely ids add would be lost.
        if len(weight):
            # Of ids that are not here it is 0.
            own = weight[ids.clamp(0, len(weight) - 1)]
            d_hidden += of_ids[:, None] * own.to(dtype)
        d_hidden = d_hidden.to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _derivable_gradients(
    ctx: Any, needed: Needed, of_log_prob: Tensor, of_log_sum: Tensor, of_mean: Tensor | None
) -> Gradients:
    """Return twice differentiable gradients, by the definition."""
    inputs, ids, dtype = ctx.saved_tensors[:3], ctx.saved_tensors[3], ctx.dtype
    hidden, weight, bias = inputs
    own_bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), own_bias)
    sums = [x for x in logit_sums(logits, ids, mean=ctx.mean) if x is not None]
    given = (of_log_prob, of_log_sum, of_mean)[: len(sums)]
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(sums, wanted, given, create_graph=True))
    of_hidden, of_weight, of_bias = (next(found) if need else None for need in needed)
    return of_hidden, of_weight, of_bias
