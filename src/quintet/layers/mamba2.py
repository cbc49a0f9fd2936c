"""The mixer of Mamba-2: a short convolution, a selective state space, a gate (arXiv:2405.21060)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from quintet.cache.recurrent import Inputs
from quintet.cache.slots import StateSlot
from quintet.kernels import parts
from quintet.kernels.ssm import MixerWeights
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear, matrices
from quintet.layers.plain import PlainModule, untouched
from quintet.layers.stack import FusedPart
from quintet.ops.conv import causal_conv
from quintet.ops.mamba2 import Calls, gated_rms_norm, heads_and_groups, mix
from quintet.ops.mamba2_learning import mix_learning
from quintet.ops.mamba2_texts import mix_texts
from quintet.sharding import WHOLE, Section, Sharding, columns, rows

# What is projected back (B, T, H·P); of each segment, the convolved channels and step sizes.
_Mixed = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]


class GatedRMSNorm(PlainModule):
    """RMS normalisation of x · silu(z) per group, in float32."""

    def __init__(self, hidden_size: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_size = hidden_size // num_groups
        self.variance_epsilon = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise x · silu(z); the result has the dtype of `z`."""
        num_groups = self.weight.shape[0] // self.group_size
        return gated_rms_norm(x, z, self.weight, num_groups, self.variance_epsilon)


class CausalConv1d(nn.Conv1d, PlainModule):
    """A depthwise convolution over the tokens; (B, C, W - 1 + T) -> (B, C, T)."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, W - 1 + T) to (B, C, T)."""
        return causal_conv(input.mT, self.weight.squeeze(1), self.bias).mT


class Mamba2(FusedPart):
    """Mix tokens through a state of N numbers a channel; axis letters as in `quintet.ops.ssd`.

    Args:
        num_heads: H.
        head_dim: P; the mixer is H·P wide inside.
        state_size: N.
        num_groups: G, the groups of heads that share b, c and a normalisation.
        conv_kernel: W, the tokens that the convolution sees.
        chunk_size: L, how many tokens are computed at once.
        dt_limits: between which two a step size is clamped.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        state_size: int,
        num_groups: int,
        conv_kernel: int,
        conv_bias: bool,
        bias: bool,
        chunk_size: int,
        dt_limits: tuple[float, float],
        layer_idx: int,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        conv = inner + 2 * num_groups * state_size
        self.head_dim = head_dim
        self.state_size = state_size
        self.chunk_size = chunk_size
        self.dt_limits = dt_limits
        self.layer_idx = layer_idx
        self.conv_kernel = conv_kernel
        self.in_proj = Linear(hidden_size, inner + conv + num_heads, bias=bias)
        self.conv1d = CausalConv1d(conv, conv, conv_kernel, groups=conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.fill_scalars()
        self.norm = GatedRMSNorm(inner, num_groups)
        self.out_proj = Linear(inner, hidden_size, bias=bias)

    @property
    def in_sizes(self) -> list[int]:
        """Widths of the input projection: H·P for the gate, x|b|c together, H step sizes."""
        H, conv = self.D.shape[0], self.conv1d.weight.shape[0]
        return [H * self.head_dim, conv, H]

    @property
    def num_groups(self) -> int:
        """G."""
        inner, conv, _ = self.in_sizes
        return (conv - inner) // (2 * self.state_size)

    def sharding(self) -> Sharding:
        """Split the heads and their groups over processes."""
        H, P, N = self.D.shape[0], self.head_dim, self.state_size
        inner = Section(H, P, "n_mamba_heads")
        steps = Section(H, 1, "n_mamba_heads")
        group = Section(self.num_groups, N, "mamba_ngroups", shared=True)
        channels = rows(inner, group, group)
        inputs = rows(inner, inner, group, group, steps)
        return Sharding(
            {
                "in_proj.weight": inputs,
                "in_proj.bias": inputs,
                "conv1d.weight": channels,
                "conv1d.bias": channels,
                **dict.fromkeys(("A_log", "D", "dt_bias"), rows(steps)),
                "norm.weight": rows(inner),
                "out_proj.weight": columns(inner),
                "out_proj.bias": WHOLE,
            },
            copies=("",),
            reduces=("out_proj",),
            first_only=("out_proj.bias",),
            spread=("norm",),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must not round the scalars of the recurrence: a decay near one would
        # become one.
        scalars_of = ((name, self._parameters[name]) for name in ("A_log", "D", "dt_bias"))
        exact = {name: parameter.data for name, parameter in scalars_of if parameter is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in exact.items():
            scalars = self.get_parameter(name)
            if scalars.dtype.itemsize < values.dtype.itemsize:
                scalars.data = values.to(scalars.device)
        return self

    @torch.no_grad()
    def fill_scalars(self) -> None:
        """Set the decay of head h to h, and let all heads pass their whole input."""
        self.A_log.copy_(torch.arange(1, len(self.A_log) + 1, device="cpu", dtype=torch.long).log())
        self.D.fill_(1)
        self.dt_bias.fill_(1)

    @torch.no_grad()
    def draw_step_sizes(self, least: float, most: float, floor: float) -> None:
        """Draw step sizes log-uniformly between two values, at least `floor`."""
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(least), math.log(most)).exp()
        dt = dt.clamp(min=floor)
        # The inverse of softplus.
        self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Map (B, T, C) to (B, T, C), continuing from the state in the cache."""
        projected = self.in_proj(hidden_states)
        raw = torch.split(projected, self.in_sizes, dim=-1)[1]
        slot = None if context.cache is None else context.cache.recurrent(self.layer_idx, raw)
        weights, calls = self._weights(), self._calls()
        lengths = context.text_lengths() if slot is None and calls is None else None
        if lengths is not None:
            learning = mix_learning(projected.flatten(0, 1), weights, lengths)
            if learning is not None:
                return self.out_proj(learning.view(*hidden_states.shape[:2], -1))  # type: ignore[no-any-return]
        cached = None if slot is None else slot.content()
        mixed = None
        if calls is None:
            mixed = self._mix_texts(projected, weights, context, slot, cached)
        if mixed is None:
            mixed = self._mix_segments(projected, weights, calls, context, slot, cached)
        out, convolved, dt = mixed
        if slot is not None and slot.remembers:
            x, b, _ = heads_and_groups(context.padded(convolved), weights)
            steps, counts = context.padded(dt), context.whole.counts
            A = -self.A_log.to(steps.dtype).exp()
            raw = context.padded(context.split(raw))
            length = context.whole.length if counts is None else counts
            slot.remember(Inputs(raw, x, steps, A, b, length))
        return self.out_proj(out)  # type: ignore[no-any-return]

    def _mix_texts(
        self,
        projected: Tensor,
        weights: MixerWeights,
        context: ForwardContext,
        slot: StateSlot | None,
        cached: tuple[Tensor, Tensor] | None,
    ) -> _Mixed | None:
        """Mix all texts of a packed row at once; None if no backend does."""
        texts = context.texts
        if texts is None:
            return None
        if slot is not None and cached is None:
            n, (C, W), H = context.segments[0].batch or texts.n, weights.taps.shape, len(weights.D)
            shape = n, H, self.head_dim, self.state_size
            state = projected.new_zeros(shape, dtype=torch.float32)
            cached = projected.new_zeros(n, W - 1, C), state
        mixed = mix_texts.by_backend(
            projected.flatten(0, 1),
            weights,
            texts=texts,
            window=None if cached is None else cached[0],
            state=None if cached is None else cached[1],
        )
        if mixed is None:
            return None
        if slot is not None and cached is not None:
            slot.update(*cached, context.whole)
        out, convolved, dt = (torch.unflatten(x, 0, projected.shape[:2]) for x in mixed)
        return out, context.split(convolved), context.split(dt)

    def _mix_segments(
        self,
        projected: Tensor,
        weights: MixerWeights,
        calls: Calls | None,
        context: ForwardContext,
        slot: StateSlot | None,
        cached: tuple[Tensor, Tensor] | None,
    ) -> _Mixed:
        """Mix the rows of each rectangle at once, one rectangle after the other."""
        mixes = []
        for segment, own in zip(context.segments, context.split(projected), strict=True):
            window, state = (None, None) if cached is None else (segment.rows_of(x) for x in cached)
            mixed = mix(
                own, weights, window, state, segment.counts, chunk_size=self.chunk_size, calls=calls
            )
            if slot is not None:
                slot.update(mixed.window, mixed.state, segment)
            mixes.append(mixed)
        out = context.joined([m.out for m in mixes])
        return out, [m.convolved for m in mixes], [m.dt for m in mixes]

    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Describe projections, convolution and scalars to the fused CPU step."""
        projections = matrices(self.in_proj, self.out_proj)
        if projections is None or self._calls() is not None:
            return None
        weights = self._weights()
        return parts.Mixer(
            norm,
            projections[0],
            projections[1],
            weights.taps,
            weights.conv_bias,
            (weights.dt_bias, weights.A_log, weights.D),
            parts.Norm(weights.norm, weights.eps),
            weights.num_groups,
            weights.dt_limits,
        )

    def cache_buffers(self, context: ForwardContext) -> tuple[Tensor, ...] | None:
        """Return window, state and recording memory of this layer, or None while empty."""
        slot = None if context.cache is None else context.cache.recurrent(self.layer_idx)
        buffers = None if slot is None else slot.buffers()
        if slot is None or buffers is None or not slot.remembers:
            return buffers
        return (*buffers, slot.record(self._weights()))

    def _calls(self) -> Calls | None:
        """Return the modules that must be called, or None if reading their weights is enough."""
        conv, norm = untouched(self.conv1d, CausalConv1d), untouched(self.norm, GatedRMSNorm)
        if conv is not None and norm is not None:
            return None
        return Calls(lambda wide: self.conv1d(wide.mT).mT, self.norm)

    def _weights(self) -> MixerWeights:
        conv, norm = untouched(self.conv1d, CausalConv1d), untouched(self.norm, GatedRMSNorm)
        inner, channels, _ = self.in_sizes
        # Of what is called, the sizes are all that is known.
        unknown = partial(torch.empty, device="meta")
        return MixerWeights(
            unknown(channels, self.conv_kernel) if conv is None else conv.weight.squeeze(1),
            None if conv is None else conv.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            unknown(inner) if norm is None else norm.weight,
            self.num_groups,
            self.dt_limits,
            0.0 if norm is None else norm.variance_epsilon,
        )
