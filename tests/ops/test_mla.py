"""The two ways to compute latent attention are one function, and the cheaper one is chosen."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.attention import AttentionBackend, eager, sdpa
from quintet.ops.masks import AttentionMask, causal_mask
from quintet.ops.mla import BREAK_EVEN_QUERIES, absorbed, absorbs, expanded
from support import relative_error

SIZES = st.integers(1, 9)


def mask_of(kind: str, B: int, H: int, T: int, S: int) -> AttentionMask:
    past = S - T
    slots = torch.arange(past, S)[None].expand(B, T)
    seen = causal_mask(slots, S, None)
    if kind == "all" and T == 1:
        return AttentionMask(None, False, past, None)
    if kind == "causal" and past == 0:
        return AttentionMask(None, True, 0, None)
    if kind == "float":
        added = torch.randn(B, 1, T, S).masked_fill(~seen, torch.finfo(torch.float32).min)
        return AttentionMask(added, False, past, None, custom=True)
    if kind == "heads":
        seen = seen & (torch.rand(B, H, T, S) < 0.8)
        seen[..., 0] = True
    return AttentionMask(seen, False, past, None)


@settings(max_examples=80, deadline=None)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 4),
    T=SIZES,
    past=st.integers(0, 7),
    Dn=SIZES,
    Dr=SIZES,
    Dv=SIZES,
    R=SIZES,
    kind=st.sampled_from(["all", "causal", "bool", "float", "heads"]),
    backend=st.sampled_from([eager, sdpa]),
    seed=st.integers(0, 2**30),
)
def test_absorbed_equals_expanded_and_so_do_gradients(
    B: int,
    H: int,
    T: int,
    past: int,
    Dn: int,
    Dr: int,
    Dv: int,
    R: int,
    kind: str,
    backend: AttentionBackend,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    S = past + T
    shapes = ((B, H, T, Dn), (B, H, T, Dr), (B, S, R), (B, S, Dr), (H, Dn + Dv, R))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    seen = mask_of(kind, B, H, T, S)
    rest = {"scale": (Dn + Dr) ** -0.5, "dropout": 0.0}

    one, weights = absorbed(*inputs, seen, **rest)
    *others, w_kv = inputs
    expand = partial(F.linear, weight=w_kv.flatten(0, 1))
    other, their_weights = expanded(*others, expand, seen, attend=backend, **rest)
    assert one.shape == other.shape == (B, H, T, Dv)
    # The weights are made in float32, as in every model.
    assert relative_error(one, other) < 1e-5
    if their_weights is not None:
        assert relative_error(weights, their_weights) < 1e-5

    probe = torch.randn_like(one)
    for mine, theirs in zip(
        torch.autograd.grad((one * probe).sum(), inputs),
        torch.autograd.grad((other * probe).sum(), inputs),
        strict=True,
    ):
        assert float((mine - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_both_equal_the_formula_of_the_paper() -> None:
    H, T, Dn, Dr, Dv, R = 2, 5, 4, 2, 3, 6
    q_nope, q_pe = torch.randn(1, H, T, Dn), torch.randn(1, H, T, Dr)
    c_kv, k_pe, w_kv = torch.randn(1, T, R), torch.randn(1, T, Dr), torch.randn(H, Dn + Dv, R)
    expected = torch.zeros(1, H, T, Dv)
    for h in range(H):
        for t in range(T):
            k = [torch.cat((w_kv[h, :Dn] @ c_kv[0, s], k_pe[0, s])) for s in range(t + 1)]
            v = [w_kv[h, Dn:] @ c_kv[0, s] for s in range(t + 1)]
            q = torch.cat((q_nope[0, h, t], q_pe[0, h, t]))
            p = torch.stack([q @ x * 0.3 for x in k]).softmax(dim=0)
            expected[0, h, t] = sum((w * x for w, x in zip(p, v, strict=True)), torch.zeros(Dv))
    seen, rest = AttentionMask(None, True, 0, None), {"scale": 0.3, "dropout": 0.0}
    inputs = (q_nope, q_pe, c_kv, k_pe)
    assert relative_error(absorbed(*inputs, w_kv, seen, **rest)[0], expected) < 1e-5
    expand = partial(F.linear, weight=w_kv.flatten(0, 1))
    for backend in (eager, sdpa):
        made = expanded(*inputs, expand, seen, attend=backend, **rest)[0]
        assert relative_error(made, expected) < 1e-5


def test_a_query_that_sees_nothing_stays_finite() -> None:
    seen = AttentionMask(torch.zeros(1, 1, 1, 4, dtype=torch.bool), False, 3, None)
    out, _ = absorbed(
        torch.randn(1, 2, 1, 4),
        torch.randn(1, 2, 1, 2),
        torch.randn(1, 4, 6),
        torch.randn(1, 4, 2),
        torch.randn(2, 7, 6),
        seen,
        scale=1.0,
        dropout=0.0,
    )
    assert bool(out.isfinite().all())


def flops(T: int, S: int, *, absorb: bool) -> int:
    """Multiplications and additions of a head, for the dimensions of the released models."""
    R, Dn, Dr, Dv = 512, 128, 64, 128
    mapped = 2 * R * (Dn + Dv) * (T if absorb else S)
    return mapped + 2 * T * S * (2 * R + Dr if absorb else Dn + Dr + Dv)


@given(T=st.integers(1, 3000), past=st.integers(0, 50_000))
def test_the_way_with_fewer_operations_is_chosen(T: int, past: int) -> None:
    S = T + past
    fewer, more = sorted((flops(T, S, absorb=True), flops(T, S, absorb=False)))
    # The break-even point is rounded to a whole query.
    if more > 1.01 * fewer:
        assert absorbs(T, S) == (flops(T, S, absorb=True) == fewer)


def test_decoding_absorbs_and_a_text_without_a_past_expands() -> None:
    assert absorbs(1, 2)
    assert absorbs(1, 100_000)
    assert absorbs(BREAK_EVEN_QUERIES - 1, 1_000_000)
    assert not absorbs(BREAK_EVEN_QUERIES, 1_000_000)
    for T in (1, 20, 170, 4000):
        assert not absorbs(T, T)


@pytest.mark.parametrize("T", [1, 3])
def test_absorbing_never_makes_a_tensor_of_all_heads_and_keys(T: int) -> None:
    """The largest tensor made is the scores: history is not expanded, not even copied."""
    H, S, Dn, Dr, Dv, R = 8, 64, 16, 8, 16, 32
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
                sizes.append(out.numel())
            return out

    inputs = (
        torch.randn(1, H, T, Dn),
        torch.randn(1, H, T, Dr),
        torch.randn(1, S, R),
        torch.randn(1, S, Dr),
        torch.randn(H, Dn + Dv, R),
    )
    with Watch():
        absorbed(*inputs, AttentionMask(None, False, S - 1, None), scale=1.0, dropout=0.0)
    assert max(sizes) == max(H * T * S, H * T * R)
