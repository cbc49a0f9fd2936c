"""Random parts of layers, and the formulas they stand for, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.kernels import parts
from quintet.kernels.latent import LatentAttention
from quintet.kernels.matrix import Matrix
from quintet.kernels.parts import Adapted, Norm, Source
from quintet.kernels.routing import Rules
from quintet.kernels.ssm import MixerWeights
from quintet.kernels.stack import Stack
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import widen_groups
from quintet.ops.mamba2 import mix_stepwise
from quintet.ops.quantized import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from support import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
# Vectors are rounded to 16 bits for integers.
QUANTIZED_BOUND = {torch.float32: 2**-12, torch.bfloat16: 2**-5}
KINDS = ("plain", "int8", "int4", "groups")
EPS = 1e-6


@dataclass
class Run:
    """A step in float64, as the formulas say."""

    x: Tensor
    embeds: Tensor
    beside: Tensor
    cos: Tensor
    sin: Tensor
    starts: list[int]


class Case(NamedTuple):
    """A part, what it keeps between steps, and its formula, which changes a run."""

    part: parts.Part
    kept: tuple[Tensor, ...]
    formula: Callable[[Run], None]


@dataclass(frozen=True)
class Maker:
    """Random parts of one kind of weights and one dtype."""

    kind: str
    dtype: torch.dtype
    C: int

    def map(self, O: int, I: int, bias: bool = False) -> tuple[Matrix, Callable[[Tensor], Tensor]]:
        """A random map as a kernel reads it, and the map."""
        b = torch.randn(O).to(self.dtype) if bias else None
        held, w = self.stored(torch.randn(O, I) / I**0.5)
        matrix = held._replace(bias=b)
        return matrix, lambda x: x @ w.T + (0 if b is None else b.double())

    def stored(self, weight: Tensor) -> tuple[Matrix, Tensor]:
        """A matrix, or a stack of such, as a kernel reads it, and the numbers it stands for."""
        if self.kind == "plain":
            w = weight.to(self.dtype)
            return Matrix(w), w.double()
        if self.kind == "int8":
            q, scale = quantize_int8(weight)
            return Matrix(q, scale), dequantize_int8(q, scale, torch.float64)
        if self.kind == "groups":
            # Of several layouts, by their shapes.
            bits = 8 if weight.shape[-2] % 3 else 4
            q, scale, offset = quantize_groups(weight, bits, 32, offset=weight.shape[-2] % 2 == 0)
            wide = widen_groups(q, scale, offset, weight.shape[-1])
            return Matrix(q, scale, None, offset), wide.double()
        q, scale = quantize_int4(weight)
        return Matrix(q, scale), dequantize_int4(q, scale, weight.shape[-1], torch.float64)

    def norm(self, of: Source = Source.HIDDEN) -> tuple[Norm, Callable[[Run], Tensor]]:
        width = 2 * self.C if of == Source.WITH_EMBEDS else self.C
        weight = (1 + 0.2 * torch.randn(width)).to(self.dtype)

        def formula(run: Run) -> Tensor:
            x = {
                Source.HIDDEN: run.x,
                Source.BESIDE: run.beside,
                Source.SUM: run.x + run.beside,
                Source.WITH_EMBEDS: torch.cat((run.x, run.embeds), dim=-1),
            }[of]
            return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

        return Norm(weight, EPS, of), formula

    def adapted(
        self, O: int, I: int, bias: bool, rank: int
    ) -> tuple[Adapted, Callable[[Tensor], Tensor]]:
        whole, f = self.map(O, I, bias)
        if not rank:
            return Adapted(whole), f
        down, d = self.map(rank, I)
        up, u = self.map(O, rank)
        return Adapted(whole, down, up), lambda x: f(x) + u(d(x))

    def attention(
        self,
        starts: list[int],
        T: int,
        K: int,
        G: int,
        D: int,
        window: int | None,
        shared: bool = False,
        rank: int = 0,
        rotates: bool = True,
    ) -> Case:
        B, S = len(starts), max(starts) + T + 3
        norm, n = self.norm(Source.WITH_EMBEDS if shared else Source.HIDDEN)
        I = 2 * self.C if shared else self.C
        (q, f_q), (k, f_k), (v, f_v) = (
            self.adapted(heads * D, I, not shared, rank) for heads in (K * G, K, K)
        )
        o, f_o = self.map(self.C, K * G * D)
        kept = tuple(torch.randn(B, K, S, D).to(self.dtype) for _ in range(2))
        old = [buffer.double() for buffer in kept]
        for b, start in enumerate(starts):
            # What lies behind must not be read before it is written.
            kept[0][b, :, start:], kept[1][b, :, start:] = torch.nan, torch.nan

        def formula(run: Run) -> None:
            x = n(run)
            made = []
            for b, start in enumerate(run.starts):
                q_, k_, v_ = (f(x[b]).view(T, -1, D).transpose(0, 1) for f in (f_q, f_k, f_v))
                if rotates:
                    cos, sin = (a[b if len(a) > 1 else 0] for a in (run.cos, run.sin))
                    q_, k_ = rotated(q_, cos, sin), rotated(k_, cos, sin)
                keys = torch.cat((old[0][b, :, :start], k_), dim=1).repeat_interleave(G, dim=0)
                values = torch.cat((old[1][b, :, :start], v_), dim=1).repeat_interleave(G, dim=0)
                at = torch.arange(start, start + T)[:, None] - torch.arange(start + T)
                seen = (at >= 0) & (at < (window or start + T + 1))
                scores = (q_ @ keys.mT * 0.2).masked_fill(~seen, -torch.inf)
                made.append(f_o((scores.softmax(-1) @ values).transpose(0, 1).reshape(T, -1)))
            if shared:
                run.beside = torch.stack(made)
            else:
                run.x = run.x + torch.stack(made)

        part = parts.Attention(norm, (q, k, v), o, D, window, 0.2, rotates=rotates, beside=shared)
        return Case(part, kept, formula)

    def gated(self, width: int) -> tuple[tuple[Matrix, ...], Callable[[Tensor], Tensor]]:
        (gate, g), (up, u) = (self.map(width, self.C) for _ in range(2))
        down, d = self.map(self.C, width)
        return (gate, up, down), lambda x: d(F.silu(g(x)) * u(x))

    def mlp(self, width: int) -> Case:
        norm, n = self.norm()
        (gate, up, down), f = self.gated(width)

        def formula(run: Run) -> None:
            run.x = run.x + f(n(run))

        return Case(parts.MLP(norm, gate, up, down), (), formula)

    def shared_mlp(self, width: int, rank: int, bias: bool) -> Case:
        norm, n = self.norm(Source.BESIDE)
        gate_up, f = self.adapted(2 * width, self.C, bias, rank)
        down, d = self.map(self.C, width, bias)
        linear, l = self.map(self.C, self.C)

        def formula(run: Run) -> None:
            gate, up = f(n(run)).chunk(2, dim=-1)
            run.beside = l(d(F.gelu(gate) * up))

        return Case(parts.SharedMLP(norm, gate_up, down, linear), (), formula)

    def mixer(self, B: int, H: int, G: int, beside: bool) -> Case:
        P, N, W = 16, 32, 3
        inner, channels = H * P, H * P + 2 * G * N
        norm, n = self.norm(Source.SUM if beside else Source.HIDDEN)
        in_proj, f_in = self.map(inner + channels + H, self.C, bias=True)
        out_proj, f_out = self.map(self.C, inner, bias=True)
        taps, conv_bias = torch.randn(channels, W) / 2, torch.randn(channels) / 4
        gated = 1 + 0.2 * torch.randn(inner)
        taps, conv_bias, gated = (x.to(self.dtype) for x in (taps, conv_bias, gated))
        scalars = (torch.randn(H) / 2, torch.rand(H).log(), torch.randn(H))
        window, state = torch.randn(B, W - 1, channels).to(self.dtype), torch.randn(B, H, P, N)
        old = window.double(), state.double()
        limits = 0.01, 2.0

        def formula(run: Run) -> None:
            wide = [x.double() for x in (taps, conv_bias, *scalars, gated)]
            weights = MixerWeights(*wide, G, limits, EPS)
            made = mix_stepwise(f_in(n(run)), weights, *old, None, chunk_size=8)
            run.x = run.x + f_out(made.out)

        part = parts.Mixer(
            norm,
            in_proj,
            out_proj,
            taps,
            conv_bias,
            scalars,
            Norm(gated, EPS),
            G,
            limits,
        )
        return Case(part, (window, state), formula)

    def final_norm(self) -> Case:
        norm, n = self.norm()

        def formula(run: Run) -> None:
            run.x = n(run)

        return Case(parts.FinalNorm(norm), (), formula)

    def routed(self, E: int, width: int, shared: int, rules: Rules, wide: bool) -> Case:
        norm, n = self.norm()
        router = (torch.randn(E, self.C) / self.C**0.5).to(self.dtype)
        bias = torch.randn(E) / 8 if rules.sigmoid else None
        share = torch.randn(1, self.C).to(self.dtype) / 8 if shared and not wide else None
        shapes = (E, width, self.C), (E, width, self.C), (E, self.C, width)
        stacks = [self.stored(torch.randn(shape) / shape[-1] ** 0.5) for shape in shapes]
        (gate, g), (up, u), (down, d) = stacks
        own, f = self.gated(shared) if shared else (None, None)

        def formula(run: Run) -> None:
            x = n(run)
            logits = x @ router.double().T
            scores = logits.sigmoid() if rules.sigmoid else logits.softmax(-1)
            best = (scores if bias is None else scores + bias).topk(rules.active, dim=-1).indices
            chosen = torch.zeros_like(scores).scatter(-1, best, 1.0)
            weights = scores * chosen
            if rules.normalise:
                weights = weights / weights.sum(-1, keepdim=True)
            hidden = F.silu(torch.einsum("btc,efc->btef", x, g)) * torch.einsum(
                "btc,efc->btef", x, u
            )
            each = torch.einsum("btef,ecf->btec", hidden, d)
            made = (each * weights[..., None] * rules.scaling).sum(-2)
            if f is not None:
                made = made + (1 if share is None else (x @ share.double().T).sigmoid()) * f(x)
            run.x = run.x + made

        stacked = gate, up, down
        part = parts.Routed(norm, router, wide, rules, bias, stacked, own, share)  # type: ignore[arg-type]
        return Case(part, (), formula)

    def latent(self, starts: list[int], T: int, H: int, rank: int, neighbours: bool) -> Case:
        B, S, R, Dn, Dr, Dv = len(starts), max(starts) + T + 3, 32, 16, 8, 12
        norm, n = self.norm()
        kv, f_kv = self.map(R + Dr, self.C, bias=True)
        q, f_q = self.map(H * (Dn + Dr), rank or self.C)
        o, f_o = self.map(self.C, H * Dv)
        w_kv = (torch.randn(H, Dn + Dv, R) / R**0.5).to(self.dtype)
        units = [(1 + 0.2 * torch.randn(width)).to(self.dtype) for width in (R, rank)]
        q_a, f_a = self.map(rank, self.C, bias=True) if rank else (None, None)
        kept = tuple(torch.randn(B, 1, S, D).to(self.dtype) for D in (R, Dr))
        old = [buffer.double() for buffer in kept]
        for b, start in enumerate(starts):
            kept[0][b, :, start:], kept[1][b, :, start:] = torch.nan, torch.nan

        def unit(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            # Neighbours part to the two halves.
            return rotated(x.unflatten(-1, (-1, 2)).mT.flatten(-2) if neighbours else x, cos, sin)

        def formula(run: Run) -> None:
            x = n(run)
            made = []
            for b, start in enumerate(run.starts):
                cos, sin = (a[b if len(a) > 1 else 0] for a in (run.cos, run.sin))
                q_ = f_q(x[b] if f_a is None else unit(f_a(x[b]), units[1]))
                q_nope, q_pe = q_.view(T, H, -1).transpose(0, 1).split((Dn, Dr), dim=-1)
                c, k = f_kv(x[b]).split((R, Dr), dim=-1)
                c = torch.cat((old[0][b, 0, :start], unit(c, units[0])))
                k = torch.cat((old[1][b, 0, :start], turned(k, cos, sin)))
                k_nope, v = (c @ w_kv.double().mT).split((Dn, Dv), dim=-1)
                scores = (q_nope @ k_nope.mT + turned(q_pe, cos, sin) @ k.T) * 0.2
                seen = torch.arange(start + T) <= torch.arange(start, start + T)[:, None]
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                made.append(f_o((weights @ v).transpose(0, 1).reshape(T, -1)))
            run.x = run.x + torch.stack(made)

        part = LatentAttention(
            norm,
            None if q_a is None else (q_a, Norm(units[1], EPS)),
            q,
            kv,
            Norm(units[0], EPS),
            o,
            w_kv,
            Dv,
            0.2,
            neighbours,
        )
        return Case(part, kept, formula)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def step(maker: Maker, starts: list[int], T: int, D: int) -> tuple[Tensor, parts.Tokens, Run]:
    """Hidden states, what else a step brings, and both in float64."""
    B, dtype = len(starts), maker.dtype
    x, embeds = (torch.randn(B, T, maker.C).to(dtype) for _ in range(2))
    angles = torch.randn(B, T, D // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    tokens = parts.Tokens(cos, sin, embeds, range(B), starts, [T] * B)
    wide = [a.double() for a in (x, embeds, cos, sin)]
    return x, tokens, Run(wide[0], wide[1], 0 * wide[0], wide[2], wide[3], starts)


def check(maker: Maker, cases: list[Case], x: Tensor, tokens: parts.Tokens, run: Run) -> None:
    for case in cases:
        case.formula(run)
    before = x.clone()
    stack = Stack.of([case.part for case in cases], maker.C, maker.dtype)
    assert stack is not None
    made = stack.run(x, tokens, [case.kept for case in cases])
    assert made is not None
    assert torch.equal(x, before)
    bound = BOUND if maker.kind == "plain" else QUANTIZED_BOUND
    error = rms_error if maker.dtype == torch.bfloat16 else relative_error
    assert error(made.double(), run.x) <= bound[maker.dtype]


def rms_error(ours: Tensor, exact: Tensor) -> float:
    # The largest of many roundings of bfloat16 is chance (docs/numerics.md).
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-9))
