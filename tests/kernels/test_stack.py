from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels import parts
from quintet.kernels.latent import LatentAttention
from quintet.kernels.linear import Matrix
from quintet.kernels.parts import Adapted, Norm, Source
from quintet.kernels.routing import Rules
from quintet.kernels.stack import Stack
from quintet.ops.mamba2 import MixerWeights, mix_stepwise
from quintet.ops.quantized import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from support import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
# Vectors are rounded to 16 bits for integers.
QUANTIZED_BOUND = {torch.float32: 2**-12, torch.bfloat16: 2**-5}
KINDS = ("plain", "int8", "int4")
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
    counts: Tensor | None


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
            made = mix_stepwise(f_in(n(run)), weights, *old, run.counts, chunk_size=8)
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


def step(
    maker: Maker, starts: list[int], T: int, D: int, counts: Tensor | None = None
) -> tuple[Tensor, parts.Tokens, Run]:
    """Hidden states, what else a step brings, and both in float64."""
    B, dtype = len(starts), maker.dtype
    x, embeds = (torch.randn(B, T, maker.C).to(dtype) for _ in range(2))
    angles = torch.randn(B, T, D // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    tokens = parts.Tokens(cos, sin, embeds, starts, counts)
    wide = [a.double() for a in (x, embeds, cos, sin)]
    return x, tokens, Run(wide[0], wide[1], 0 * wide[0], wide[2], wide[3], starts, counts)


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
    if run.counts is not None:
        for b, count in enumerate(run.counts.tolist()):
            made[b, count:], run.x[b, count:] = 0, 0
    error = rms_error if maker.dtype == torch.bfloat16 else relative_error
    assert error(made.double(), run.x) <= bound[maker.dtype]


def rms_error(ours: Tensor, exact: Tensor) -> float:
    # The largest of many roundings of bfloat16 is chance (docs/numerics.md).
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-9))


kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", list(BOUND), ids=str)
few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dtypes
@kinds
@few
@given(
    starts=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    T=st.integers(1, 2),
    C=st.sampled_from([64, 100, 192]),
    width=st.sampled_from([72, 256]),
    K=st.integers(1, 3),
    G=st.integers(1, 5),
    D=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 30]),
    threads=st.integers(1, 5),
)
def test_attention_and_mlp_in_one_call_are_what_the_formulas_say(
    level: str,
    dtype: torch.dtype,
    kind: str,
    starts: list[int],
    T: int,
    C: int,
    width: int,
    K: int,
    G: int,
    D: int,
    window: int | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + width + K + T)
    maker = Maker(kind, dtype, C)
    cases = [
        case
        for _ in range(2)
        for case in (maker.attention(starts, T, K, G, D, window), maker.mlp(width))
    ]
    cases.append(maker.final_norm())
    check(maker, cases, *step(maker, starts, T, D))
    keys = cases[0].kept[0]
    for b, start in enumerate(starts):
        assert keys[b, :, start : start + T].isfinite().all()
        assert keys[b, :, start + T :].isnan().all()


@dtypes
@kinds
@few
@given(
    starts=st.lists(st.integers(0, 300), min_size=1, max_size=2),
    T=st.integers(1, 3),
    C=st.sampled_from([64, 100]),
    G=st.integers(1, 2),
    rank=st.sampled_from([0, 5, 32]),
    rotates=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    threads=st.integers(1, 4),
)
def test_a_shared_block_and_mixers_in_one_call_are_what_the_formulas_say(
    level: str,
    dtype: torch.dtype,
    kind: str,
    starts: list[int],
    T: int,
    C: int,
    G: int,
    rank: int,
    rotates: bool,
    bias: bool,
    ragged: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + T + rank)
    maker = Maker(kind, dtype, C)
    B = len(starts)
    counts = torch.randint(0, T + 1, (B,)) if ragged else None
    cases = [
        maker.mixer(B, 4, G, beside=False),
        maker.attention(starts, T, 2, 2, 16, None, shared=True, rank=rank, rotates=rotates),
        maker.shared_mlp(72, rank or 3, bias),
        maker.mixer(B, 4, G, beside=True),
    ]
    check(maker, cases, *step(maker, starts, T, 16, counts))


@dtypes
@kinds
@few
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 2),
    C=st.sampled_from([64, 100]),
    width=st.sampled_from([40, 64]),
    shared=st.sampled_from([0, 72]),
    sigmoid=st.booleans(),
    normalise=st.booleans(),
    wide=st.booleans(),
    threads=st.integers(1, 4),
)
def test_experts_in_one_call_are_what_the_formulas_say(
    level: str,
    dtype: torch.dtype,
    kind: str,
    B: int,
    T: int,
    C: int,
    width: int,
    shared: int,
    sigmoid: bool,
    normalise: bool,
    wide: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + width + B + T)
    maker = Maker(kind, dtype, C)
    # Where inputs are rounded, others may be chosen of experts that suit a token alike.
    active = 2 if kind == "plain" and dtype == torch.float32 else 6
    rules = Rules(
        active=active, sigmoid=sigmoid and wide, normalise=normalise, scaling=1.5 if wide else 1.0
    )
    cases = [maker.routed(6, width, shared, rules, wide), maker.mlp(72)]
    check(maker, cases, *step(maker, [0] * B, T, 16))


@kinds
@few
@given(
    starts=st.lists(st.integers(0, 900), min_size=1, max_size=3),
    T=st.integers(1, 2),
    C=st.sampled_from([64, 100]),
    H=st.sampled_from([1, 3, 16]),
    rank=st.sampled_from([0, 20, 64]),
    neighbours=st.booleans(),
    threads=st.integers(1, 4),
)
def test_latent_attention_in_one_call_is_what_the_formulas_say(
    level: str,
    kind: str,
    starts: list[int],
    T: int,
    C: int,
    H: int,
    rank: int,
    neighbours: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + H + rank + T)
    maker = Maker(kind, torch.bfloat16, C)
    cases = [
        case
        for _ in range(2)
        for case in (maker.latent(starts, T, H, rank, neighbours), maker.mlp(72))
    ]
    check(maker, cases, *step(maker, starts, T, 8))
    for buffer in cases[0].kept:
        for b, start in enumerate(starts):
            assert buffer[b, :, start : start + T].isfinite().all()
            assert buffer[b, :, start + T :].isnan().all()


def test_latents_and_their_weights_have_to_be_laid_out_as_they_are_read(level: str) -> None:
    maker = Maker("plain", torch.bfloat16, 64)

    def run(kept: int | None = None, buffer: Tensor | None = None, **fields: Any) -> Tensor | None:
        case = maker.latent([4], 1, 2, 20, True)
        stack = Stack.of([replace(case.part, **fields)], 64, torch.bfloat16)  # type: ignore[type-var]
        x, tokens, _ = step(maker, [4], 1, 8)
        held = list(case.kept)
        if kept is not None and buffer is not None:
            held[kept] = buffer
        return None if stack is None else stack.run(x, tokens, [held])

    assert run() is not None
    w_kv = torch.randn(2, 28, 32).bfloat16()
    assert run(w_kv=w_kv) is not None
    assert run(w_kv=w_kv.float()) is None
    assert run(w_kv=w_kv[:, :27]) is None
    assert run(w_kv=w_kv[:, :, :31]) is None
    assert run(w_kv=w_kv.mT.contiguous().mT) is None
    assert run(q_a=None) is None
    assert run(kv_norm=Norm(torch.ones(31).bfloat16(), EPS)) is None
    assert run(kept=0, buffer=torch.zeros(1, 1, 8, 32).bfloat16()) is not None
    assert run(kept=0, buffer=torch.zeros(1, 1, 4, 32).bfloat16()) is None
    assert run(kept=0, buffer=torch.zeros(1, 2, 8, 32).bfloat16()) is None
    assert run(kept=1, buffer=torch.zeros(1, 1, 8, 32).bfloat16()) is None
    assert run(kept=1, buffer=torch.zeros(1, 1, 8, 8)) is None
    wide = Maker("plain", torch.float32, 64)
    assert Stack.of([wide.latent([4], 1, 2, 20, True).part], 64, torch.float32) is None


def test_what_it_cannot_do_is_left_to_the_layers(level: str) -> None:
    maker = Maker("plain", torch.float32, 64)

    def run(change: str = "", keys: Tensor | None = None, **fields: Any) -> Tensor | None:
        cases = [maker.attention([4], 1, 1, 2, 16, None), maker.mlp(72)]
        held = [case.part for case in cases]
        held[1] = replace(held[1], **fields)  # type: ignore[type-var]
        stack = Stack.of(held, 64, torch.float32)
        if stack is None:
            return None
        x, tokens, _ = step(maker, [4], 1, 16)
        kept = [list(case.kept) for case in cases]
        if change == "gradient":
            x.requires_grad_()
        if change == "half":
            x = x.half()
        if change == "angles":
            tokens = replace(tokens, cos=tokens.cos[..., :8])
        if change == "embeddings":
            tokens = replace(tokens, embeds=tokens.embeds[..., :8])
        if change == "no room":
            tokens = replace(tokens, starts=[100])
        if change == "rows":
            tokens = replace(tokens, starts=[4, 4])
        if change == "nothing kept":
            kept[0] = []
        if keys is not None:
            kept[0][0] = keys
        x = x.expand(1, 17, 64) if change == "many" else x
        return stack.run(x, tokens, kept)

    assert run() is not None
    changes = ["gradient", "half", "angles", "embeddings", "rows", "many"]
    for change in [*changes, "no room", "nothing kept"]:
        assert run(change) is None, change
    weight = torch.randn(72, 64)
    assert run(gate=Matrix(weight)) is not None
    assert run(gate=Matrix(weight, None, torch.randn(72))) is None
    assert run(gate=Matrix(weight.bfloat16())) is None
    assert run(gate=Matrix(weight[:71])) is None
    assert run(gate=Matrix(torch.randn(64, 72).T)) is None
    assert run(norm=Norm(torch.ones(63), EPS)) is None
    assert run(keys=torch.zeros(1, 1, 8, 32)) is None
    assert run(keys=torch.zeros(1, 1, 4, 16)) is None
    trained = Matrix(torch.randn(72, 64, requires_grad=True))
    with torch.no_grad():
        assert run(gate=trained) is not None
    assert run(gate=trained) is None


def test_state_and_experts_have_to_be_laid_out_as_they_are_read(level: str) -> None:
    maker = Maker("plain", torch.float32, 64)
    x, tokens, _ = step(maker, [0], 1, 16)

    def run(case: Case, kept: tuple[Tensor, ...] | None = None, **fields: Any) -> Tensor | None:
        stack = Stack.of([replace(case.part, **fields)], 64, torch.float32)  # type: ignore[type-var]
        return None if stack is None else stack.run(x, tokens, [kept or case.kept])

    mixer = maker.mixer(1, 4, 1, beside=False)
    window, state = mixer.kept
    assert run(mixer) is not None
    assert run(mixer, (window, state.double())) is None
    assert run(mixer, (window[..., 1:], state)) is None
    assert run(mixer, (window, state.transpose(2, 3))) is None
    assert run(mixer, num_groups=2) is None
    assert run(mixer, scalars=(torch.randn(4).double(), torch.randn(4), torch.randn(4))) is None
    experts = maker.routed(6, 40, 72, Rules(active=2), wide=True)
    assert run(experts) is not None
    assert run(experts, rules=Rules(active=7)) is None
    assert run(experts, router=torch.randn(5, 64)) is None
    assert run(experts, bias=torch.randn(5)) is None
    assert run(experts, share=torch.randn(2, 64)) is None
    assert run(experts, shared=None) is not None
