"""What a vector, a query or a token comes out as is the same bits beside any others."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.attention import attend
from quintet.kernels.decode import decode
from quintet.kernels.gated import gated
from quintet.kernels.grouped import grouped_silu_experts
from quintet.kernels.latent import attend_latents
from quintet.kernels.linear import HEAD, STEP_TOKENS, linears
from quintet.kernels.matrix import Matrix
from quintet.kernels.product import gated_products, products
from quintet.kernels.routing import Rules, choose, router_logits
from quintet.kernels.ssm import MixerWeights, mamba2
from quintet.ops.quantized import quantize_int4, quantize_int8

# Of released models; what is summed in how many pieces shows at none of the small ones.
WIDTHS = [896, 1536, 2048, 4864]
BF16 = torch.bfloat16
once = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for many vectors are summed as those for few are, where it is asked for."""
    monkeypatch.setenv("QUINTET_BATCH_INVARIANT", "1")


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def stored(kind: str, weight: Tensor) -> Matrix:
    if kind == "int8":
        return Matrix(*quantize_int8(weight))
    return Matrix(*quantize_int4(weight)) if kind == "int4" else Matrix(weight.to(BF16))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@once
@given(
    I=st.sampled_from([*WIDTHS, 100, 31]),
    O=st.integers(1, 70),
    M=st.integers(2, 64),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_a_vector_is_mapped_alike_alone_and_beside_any_number_of_others(
    level: str, kind: str, I: int, O: int, M: int, threads: int, data: st.DataObject
) -> None:
    M = M if kind == "bf16" else min(M, STEP_TOKENS)
    matrix = stored(kind, torch.randn(O, I) / I**0.5)
    bias = torch.randn(O).to(BF16) if O % 2 else None
    x = torch.randn(M, I).to(BF16)
    maps = [matrix._replace(bias=bias), matrix]
    torch.set_num_threads(1)
    alone = linears(x[:1], maps)
    torch.set_num_threads(threads)
    at = data.draw(st.integers(0, M - 1))
    beside = linears(torch.cat((x[1 : at + 1], x[:1], x[at + 1 :])), maps)
    assert alone is not None
    assert beside is not None
    for one, all_ in zip(alone, beside, strict=True):
        assert same(one[0], all_[at])
    if kind == "bf16":
        for few, many in zip(beside, products(torch.cat((x, x)), maps) or (), strict=True):
            row = len(x) if at == 0 else 0
            assert same(few[at], many[row])


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@once
@given(
    I=st.sampled_from([100, 300, 896]),
    M=st.integers(2, 64),
    far=st.sets(st.integers(0, 63)),
    threads=st.integers(1, 3),
)
def test_outliers_of_one_vector_are_nothing_to_those_beside_it(
    level: str, kind: str, I: int, M: int, far: set[int], threads: int
) -> None:
    matrix = stored(kind, torch.randn(HEAD, I) / I**0.5)
    x = torch.randn(M, I)
    for m in far & set(range(M)):
        x[m, m % I] = 1e4
    x = x.to(BF16)
    torch.set_num_threads(threads)
    beside = linears(x, [matrix])
    assert beside is not None
    for m in {0, M // 2, M - 1}:
        assert same((linears(x[m : m + 1], [matrix]) or [None])[0], beside[0][m : m + 1])


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@once
@given(C=st.sampled_from([896, 100]), F=st.integers(1, 70), N=st.integers(2, 16), data=st.data())
def test_gates_are_alike_whichever_kernel_computes_them(
    level: str, kind: str, C: int, F: int, N: int, data: st.DataObject
) -> None:
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    gate, up = (stored(kind, torch.randn(F, C) / C**0.5) for _ in range(2))
    down = stored(kind, torch.randn(C, F) / F**0.5)
    x = torch.randn(N, C).to(BF16)
    every = gated(x, gate, up, down)
    assert every is not None
    assert same(gated(x[N // 2 :][:1], gate, up, down), every[N // 2 :][:1])
    if kind == "bf16":
        inside = gated_products(x, gate, up)
        assert inside is not None
        made = products(inside, [down])
        assert made is not None
        assert same(made[0], every)


@once
@given(N=st.integers(2, 32), E=st.integers(2, 9), C=st.sampled_from([896, 100]), data=st.data())
def test_a_token_goes_through_its_experts_alike_among_few_and_many(
    level: str, N: int, E: int, C: int, data: st.DataObject
) -> None:
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    F, A = 40, 2
    gate_up, down = torch.randn(E, 2 * F, C) / C**0.5, torch.randn(E, C, F) / F**0.5
    gate_up, down = gate_up.to(BF16), down.to(BF16)
    x, shares = torch.randn(N, C).to(BF16), torch.rand(N, A)
    indices = torch.rand(N, E).topk(A).indices
    gate, up = (Matrix(half) for half in gate_up.chunk(2, dim=1))
    every = gated(x, gate, up, Matrix(down), indices, shares)
    assert every is not None
    one = slice(N - 1, N)
    assert same(gated(x[one], gate, up, Matrix(down), indices[one], shares[one]), every[one])
    assert same(grouped_silu_experts(x, indices, shares, gate_up, down), every)


@once
@given(N=st.integers(2, 80), E=st.integers(4, 70), C=st.sampled_from([2048, 100]))
def test_a_token_is_routed_alike_among_any_others(level: str, N: int, E: int, C: int) -> None:
    x, weight = torch.randn(N, C).to(BF16), torch.randn(E, C).to(BF16)
    every = router_logits(x, weight)
    assert every is not None
    assert same(router_logits(x[-1:], weight), every[-1:])
    rules = Rules(active=2, normalise=True)
    chosen, alone = choose(every, rules), choose(every[-1:], rules)
    assert chosen is not None
    assert alone is not None
    assert torch.equal(chosen[0][-1:], alone[0])
    assert same(chosen[1][-1:], alone[1])


@once
@given(
    starts=st.lists(st.integers(0, 1200), min_size=1, max_size=5),
    T=st.integers(1, 16),
    K=st.integers(1, 3),
    window=st.sampled_from([None, 300]),
    dtype=st.sampled_from([BF16, torch.float32]),
    threads=st.integers(1, 3),
)
def test_a_step_attends_alike_beside_any_others(
    level: str,
    starts: list[int],
    T: int,
    K: int,
    window: int | None,
    dtype: torch.dtype,
    threads: int,
) -> None:
    B, S = len(starts), max(starts) + T
    q = torch.randn(B, 2 * K, T, 32).to(dtype)
    k, v = (torch.randn(B, K, S, 32).to(dtype) for _ in range(2))
    start = torch.tensor(starts)
    torch.set_num_threads(threads)
    every = decode(q, k, v, start=start, window=window, scale=0.2)
    assert every is not None
    torch.set_num_threads(1)
    for b in range(B):
        one = slice(b, b + 1)
        for t in range(T):
            alone = decode(
                q[one, :, t : t + 1], k[one], v[one], start=starts[b] + t, window=window, scale=0.2
            )
            assert same(alone, every[one, :, t : t + 1].contiguous())


@once
@given(
    T=st.integers(200, 700),
    cut=st.integers(20, 180),
    B=st.integers(1, 2),
    K=st.integers(1, 2),
    window=st.sampled_from([None, 150]),
    threads=st.integers(1, 3),
)
def test_a_prompt_attends_alike_however_it_is_cut(
    level: str, T: int, cut: int, B: int, K: int, window: int | None, threads: int
) -> None:
    q = torch.randn(B, 3 * K, T, 32).to(BF16)
    k, v = (torch.randn(B, K, T, 32).to(BF16) for _ in range(2))
    torch.set_num_threads(threads)
    whole = attend((q,), (k,), v, start=0, window=window, scale=0.3)
    assert whole is not None
    torch.set_num_threads(1)
    for first in range(0, T, cut):
        last = min(T, first + cut)
        piece = attend(
            (q[-1:, :, first:last],),
            (k[-1:, :, :last],),
            v[-1:, :, :last],
            start=first,
            window=window,
            scale=0.3,
        )
        assert piece is not None
        assert same(piece.contiguous(), whole[-1:, :, first:last].contiguous())


@once
@given(
    starts=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    T=st.integers(1, 20),
    H=st.sampled_from([1, 16, 20]),
    threads=st.integers(1, 3),
)
def test_latents_are_attended_to_alike_beside_any_others(
    level: str, starts: list[int], T: int, H: int, threads: int
) -> None:
    B, S, R, Dn, Dr, Dv = len(starts), max(starts) + T, 64, 16, 8, 12
    q_nope, q_pe = torch.randn(B, H, T, Dn).to(BF16), torch.randn(B, H, T, Dr).to(BF16)
    c_kv, k_pe = torch.randn(B, S, R).to(BF16), torch.randn(B, S, Dr).to(BF16)
    w = (torch.randn(H, Dn + Dv, R) / R**0.5).to(BF16)
    torch.set_num_threads(threads)
    every = attend_latents(q_nope, q_pe, c_kv, k_pe, w, start=torch.tensor(starts), scale=0.2)
    assert every is not None
    torch.set_num_threads(1)
    for b, start in enumerate(starts):
        one = slice(b, b + 1)
        own = (x[one] for x in (q_nope[:, :, -1:], q_pe[:, :, -1:], c_kv, k_pe))
        alone = attend_latents(*own, w, start=start + T - 1, scale=0.2)
        assert same(alone, every[one, :, -1:].contiguous())


@once
@given(blocks=st.integers(1, 4), rest=st.integers(2, 63), threads=st.integers(1, 3))
def test_a_mixer_makes_the_same_of_a_text_cut_at_its_blocks(
    level: str, blocks: int, rest: int, threads: int
) -> None:
    H, P, N, W, T = 4, 16, 16, 4, 64 * blocks + rest
    C = H * P + 2 * N
    projected = torch.randn(2, T, H * P + C + H).to(BF16)
    taps, norm = torch.randn(C, W).to(BF16), torch.randn(H * P).to(BF16)
    scalars = torch.randn(H), torch.rand(H), torch.randn(H)
    weights = MixerWeights(taps, None, *scalars, norm, 1, (0.001, 10.0), 1e-5)

    def run(x: Tensor, window: Tensor | None, state: Tensor | None) -> tuple[Tensor, ...]:
        made = mamba2(x, weights, window=window, state=state, counts=None)
        assert made is not None
        return made

    torch.set_num_threads(threads)
    whole, *_ = run(projected, None, None)
    torch.set_num_threads(1)
    window, state, first = None, None, 0
    for last in (64, T) if blocks > 1 else (64 * blocks, T):
        out, window, state, *_ = run(projected[1:, first:last], window, state)
        assert same(out, whole[1:, first:last].contiguous())
        first = last


@once
@given(
    I=st.sampled_from([*WIDTHS, 100, 31]),
    O=st.integers(1, 70),
    M=st.integers(1, 90),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_vectors_of_prompts_are_mapped_alike_in_their_own_order_too(
    level: str,
    I: int,
    O: int,
    M: int,
    threads: int,
    data: st.DataObject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("QUINTET_BATCH_INVARIANT", raising=False)
    x, matrix = torch.randn(M, I).to(BF16), stored("bf16", torch.randn(O, I))
    one = data.draw(st.integers(0, M - 1))
    torch.set_num_threads(threads)
    whole = products(x, [matrix])
    torch.set_num_threads(1)
    alone = products(x[one : one + 1], [matrix])
    assert whole is not None
    assert alone is not None
    assert same(whole[0][one : one + 1], alone[0])
