from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.formulas import BOUND, EPS, KINDS, Case, Maker, check, step
from quintet.kernels.matrix import Matrix
from quintet.kernels.parts import Norm
from quintet.kernels.routing import Rules
from quintet.kernels.stack import Stack

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
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + T + rank)
    maker = Maker(kind, dtype, C)
    B = len(starts)
    cases = [
        maker.mixer(B, 4, G, beside=False),
        maker.attention(starts, T, 2, 2, 16, None, shared=True, rank=rank, rotates=rotates),
        maker.shared_mlp(72, rank or 3, bias),
        maker.mixer(B, 4, G, beside=True),
    ]
    check(maker, cases, *step(maker, starts, T, 16))


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
        x = x.expand(1, 65, 64) if change == "many" else x
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
