"""Context parallelism: the tokens of a sequence on several processes, with all weights on each.

Of 2c chunks of a row, process i of c has the chunks i and 2c - 1 - i, so that all have about as
many pairs of a query and a key it sees. Attention gathers what a cache would hold: keys and values,
or the latents they are made of. Mamba-2's chunks run from an empty state each; the processes then
tell each other what every chunk adds to a state and leaves of it, and add what the state before
would have made (arXiv:2405.21060, §6). All else goes token by token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quintet.cache import Cache, Segment
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.layers.context import ForwardContext, Notes
from quintet.layers.mamba2 import Mamba2
from quintet.ops.conv import causal_conv, continued
from quintet.ops.documents import documents_of
from quintet.ops.mamba2 import heads_and_groups
from quintet.ops.ssd import ssd, step_sizes
from quintet.parallel.world import World


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The chunks of rows that this process computes.

    Attributes:
        group: the processes that have the others.
        index: which of them this is.
        count: how many there are.
        tokens: how many a row has, without what fills it up.
        least: how many a chunk has at least.
    """

    group: dist.ProcessGroup
    index: int
    count: int
    tokens: int
    least: int = 1

    @property
    def chunk(self) -> int:
        """The number of tokens in a chunk, padding included."""
        return max(-(-self.tokens // (2 * self.count)), self.least)

    @property
    def length(self) -> int:
        """The padded length of a row."""
        return 2 * self.count * self.chunk

    def filled(self, x: Tensor, value: int = 0) -> Tensor:
        """Fill rows (B, T, ...) up."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.length - x.shape[1]), value=value)

    def of(self, x: Tensor, value: int = 0) -> Tensor:
        """Return this process's part of rows (B, T, ...), padded."""
        chunks = torch.unflatten(self.filled(x, value), 1, (2 * self.count, -1))
        return self.pair(chunks).flatten(1, 2)

    def pair(self, chunks: Tensor) -> Tensor:
        """Return the two chunks of this process, (B, 2, ...) of (B, 2c, ...)."""
        return chunks[:, [self.index, 2 * self.count - 1 - self.index]]

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of all processes' values for their own tokens, without gradients."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """Return all processes' parts joined along a dimension, in order; gradients come back."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Joined.apply(x, self, dim)  # type: ignore[no-any-return, no-untyped-call]
        return _join(x, self, dim)


class GatheringCache(Cache):
    """A cache that gathers the keys of all processes and stores nothing.

    Args:
        chunks: which tokens this process has.
        index: (B, T) the number of each token's text; a token sees those of its own alone.
    """

    def __init__(self, chunks: Chunks, index: Tensor) -> None:
        super().__init__([])
        self.chunks = chunks
        places = torch.arange(chunks.length, device=index.device, dtype=torch.long)[None]
        self._places = chunks.of(places)
        own = chunks.of(index, -1)
        self._same = own[:, :, None] == chunks.filled(index, -1)[:, None, :]
        self.keeps_nothing = True

    def fit(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        """Fit any model."""

    def segment(
        self, batch: int, length: int, device: torch.device, counts: Tensor | None
    ) -> Segment:
        """Return the places of this process's tokens, and which keys are of their texts."""
        start = self._places[:, 0]
        return Segment(
            start, length, self.chunks.length, None, device, places=self._places, same=self._same
        )

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, segment: Segment | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, T, D) of all processes."""
        return self.chunks.joined(keys, 2), self.chunks.joined(values, 2)

    def advance(self, segment: Segment) -> None:
        """Count nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class SplitMixer:
    """The forward of Mamba-2 over the chunks of a sequence that this process has."""

    mixer: Mamba2

    def __call__(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        cache, mixer = context.cache, self.mixer
        if not isinstance(cache, GatheringCache):
            return type(mixer).forward(mixer, hidden_states, context)
        chunks = cache.chunks
        # The two chunks of each row, (2B, L, ...), first all first ones.
        projected = torch.cat(mixer.in_proj(hidden_states).chunk(2, dim=1))
        weights, calls = mixer._weights(), mixer._calls()
        z, raw, dt = torch.split(projected, mixer.in_sizes, dim=-1)
        wide = continued(raw, _before(raw, chunks, mixer.conv_kernel - 1), mixer.conv_kernel)
        conv = partial(causal_conv, weight=weights.taps, bias=weights.conv_bias)
        convolved = F.silu((conv if calls is None else calls.convolve)(wide))
        x, b, c = heads_and_groups(convolved, weights)
        dt = step_sizes(dt, weights.dt_bias, weights.dt_limits, None)
        rates = -weights.A_log.to(dt.dtype).exp()
        y, final_state = ssd(x, dt, rates, b, c, weights.D, None, chunk_size=mixer.chunk_size)
        decay = dt * rates
        state = _states_before(final_state, decay.sum(dim=1), chunks)
        c = c.to(dt.dtype).repeat_interleave(x.shape[2] // c.shape[2], dim=2)
        late = torch.einsum("blhn,bhpn->blhp", c, state)
        y = y + late * decay.cumsum(dim=1).exp()[..., None]
        out = mixer.norm(y.flatten(2), z)
        return mixer.out_proj(torch.cat(out.chunk(2), dim=1))  # type: ignore[no-any-return]


def _both(x: Tensor) -> Tensor:
    """Return (B, 2, ...) of (2B, ...)."""
    return torch.stack(x.chunk(2), dim=1)


def _before(raw: Tensor, chunks: Chunks, count: int) -> Tensor | None:
    """Return the `count` inputs before each chunk (2B, L, C), zeros before the first."""
    if not count:
        return None
    tails = chunks.joined(_both(raw[:, -count:]), 1)
    before = torch.cat((torch.zeros_like(tails[:, :1]), tails[:, :-1]), dim=1)
    return torch.cat(chunks.pair(before).unbind(dim=1))


def _states_before(final_states: Tensor, decay: Tensor, chunks: Chunks) -> Tensor:
    """Return the state each chunk begins with, (2B, H, P, N).

    Shapes: made (2B, H, P, N), what a chunk adds; decay (2B, H), the logarithm of what it leaves.
    """
    added, decayed = chunks.joined(_both(final_states), 1), chunks.joined(_both(decay), 1).exp()
    state, states = torch.zeros_like(added[:, 0]), []
    for k in range(added.shape[1]):
        states.append(state)
        state = added[:, k] + decayed[:, k, :, None, None] * state
    return torch.cat(chunks.pair(torch.stack(states, dim=1)).unbind(dim=1))


def connect_sequences(model: nn.Module) -> None:
    """Let the layers of a model run over parts of sequences."""
    for module in model.modules():
        if isinstance(module, Mamba2):
            vars(module)["forward"] = SplitMixer(module)


class SequenceStates(NamedTuple):
    """The model's outputs for this process's tokens.

    Attributes:
        hidden: (B, T/c, C), normalised.
        ahead: the same of each prediction layer.
        router_logits: (B·T/c, E) of each layer with experts, those of prediction layers last.
    """

    hidden: Tensor
    ahead: tuple[Tensor, ...] = ()
    router_logits: tuple[Tensor, ...] = ()


class _Model(Protocol):
    """Interface of a model for context parallelism."""

    config: PreTrainedConfig
    base_model: Any

    @property
    def ends_here(self) -> bool:
        """Whether the last layer is in this process."""
        ...


class Sequences:
    """A model of which each process runs over a part of every row.

    Args:
        model: all of its weights, or those that `tp` leaves.
        world: the processes.

    Attributes:
        real: (B·T/c,) which of the tokens that run now are some, and neither padding nor what
            fills rows up; None if no such forward runs.
    """

    real: Tensor | None = None

    def __init__(self, model: nn.Module, world: World) -> None:
        connect_sequences(model)
        self.model, self.world = cast("_Model", model), world
        kernels = [m.conv_kernel - 1 for m in model.modules() if isinstance(m, Mamba2)]
        self._least = max(kernels, default=1)

    def chunks(self, tokens: int) -> Chunks:
        """Return this process's chunks of rows of that many tokens."""
        index, count = self.world.coordinates["cp"], self.world.degrees.cp
        return Chunks(self.world.groups["cp"], index, count, tokens, self._least)

    def once(self, x: Tensor) -> Tensor:
        """Return x, which all have alike, in one process, and in others 0 that learns as x does."""
        return x if self.world.coordinates["cp"] == 0 else x - x.detach()

    def states(
        self,
        ids: Tensor,
        seq_idx: Tensor | None = None,
        attention_mask: Tensor | None = None,
        depth: int = 0,
        *,
        routed: bool = False,
    ) -> SequenceStates:
        """Run over this process's part of rows (B, T), of which all have all ids.

        Args:
            ids: of the tokens.
            seq_idx: (B, T) the number of each token's text in its row; None for one text a row.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None for no padding.
            depth: how many prediction layers are run.
            routed: keep what the routers computed.

        Raises:
            InputError: a recurrent layer would carry its state from one text into another.
        """
        chunks = self.chunks(ids.shape[1])
        index, positions = texts_in(ids, seq_idx, attention_mask)
        if self.model.config.recurrent_layers():
            check_recurrent(index)
        options = {"output_router_logits": True} if routed else {}
        cache = GatheringCache(chunks, index)
        self.real = chunks.of(index, -1).flatten() >= 0
        try:
            output = self.model.base_model(
                input_ids=chunks.of(ids),
                position_ids=chunks.of(positions),
                past_key_values=cache,
                use_cache=False,
                return_dict=True,
                **options,
            )
            hidden = output.last_hidden_state
            notes = Notes(router_logits=routed)
            # Prediction layers are behind the last one.
            depth = depth if self.model.ends_here else 0
            ahead = tuple(self._ahead(ids, index, hidden, cache, notes, depth))
        finally:
            self.real = None
        logits = tuple(output.router_logits) if routed else ()
        logits += tuple(x.flatten(0, 1) for x in notes.router_logits or ())
        return SequenceStates(hidden, ahead, logits)

    def _ahead(
        self,
        ids: Tensor,
        index: Tensor,
        states: Tensor,
        cache: GatheringCache,
        notes: Notes,
        depth: int,
    ) -> Iterator[Tensor]:
        """Yield the states of each prediction layer."""
        chunks, decoder = cache.chunks, self.model.base_model
        whole = cache.segment(len(ids), states.shape[1], ids.device, None)
        for k in range(1, depth + 1):
            # Shifted before they are divided: the next token may be another process's.
            padding = (0, min(k, ids.shape[1]))
            later = F.pad(ids[:, k:], padding)
            same = F.pad(index[:, k:], padding, value=-1) == index
            embeds = decoder.vectors(chunks.of(later))
            embeds = embeds.masked_fill(~chunks.of(same)[..., None], 0)
            states = decoder.predict(k - 1, states, embeds, (whole, (whole,)), cache, notes)
            yield states


def texts_in(
    ids: Tensor, seq_idx: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the number (B, T) of each token's text, -1 for padding, and its position."""
    index = torch.zeros_like(ids)
    positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.long).expand_as(ids)
    if attention_mask is not None:
        real = attention_mask.bool()
        index = index.masked_fill(~real, -1)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    texts = None if seq_idx is None else documents_of(seq_idx)
    if texts is not None:
        index, positions = texts.index.masked_fill(index < 0, -1), texts.positions()
    return index, positions


def check_recurrent(index: Tensor) -> None:
    """Refuse rows in which a recurrent state would pass from one text to another.

    Args:
        index: (B, T) the number of each token's text in its row, -1 for padding.

    Raises:
        InputError: there is one.
    """
    starts = (index.diff(dim=1) != 0) & (index[:, 1:] >= 0)
    if bool((index[:, :1] < 0).any()) or bool(starts.any()):
        raise InputError(
            "cp divides rows of one text for layers with recurrent states, with padding behind it "
            'alone; give each text a row of its own ([data] packing = "padded"), let texts in '
            "a row be one (borders = false), or leave cp out"
        )


def _join(x: Tensor, chunks: Chunks, dim: int) -> Tensor:
    own = x.detach().movedim(dim, 0).contiguous()
    parts = [torch.empty_like(own) for _ in range(chunks.count)]
    dist.all_gather(parts, own, group=chunks.group)
    first, second = torch.stack(parts).chunk(2, dim=1)
    ordered = torch.cat((first, second.flip(0)))
    return ordered.flatten(0, 1).movedim(0, dim)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chunks: Chunks, dim: int) -> Tensor:
        ctx.chunks, ctx.dim = chunks, dim
        return _join(x, chunks, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        chunks: Chunks = ctx.chunks
        ordered = torch.unflatten(gradient.movedim(ctx.dim, 0), 0, (2 * chunks.count, -1))
        first, second = ordered[: chunks.count], ordered[chunks.count :].flip(0)
        parts = list(torch.cat((first, second), dim=1).unbind())
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=chunks.group)
        return own.movedim(0, ctx.dim), None, None
