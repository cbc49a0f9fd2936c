"""The backends compute one function: eager is its definition, the others equal it.

flash-attn needs CUDA to be installed; a stand-in with the documented semantics of its two
functions checks what is passed to them.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quintet.errors import MissingDependencyError, UnsupportedBackendError
from quintet.ops.attention import BACKENDS, attention_backend, eager, flash, sdpa
from quintet.ops.causal_blocks import in_blocks
from quintet.ops.masks import AttentionMask, attention_mask_of
from support import relative_error

B, D = 3, 8
SCALE = D**-0.5
HEADS = pytest.mark.parametrize(("H", "K"), [(4, 2), (4, 4), (4, 1)], ids=["gqa", "mha", "mqa"])


def tensors(H: int, K: int, T: int, S: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def uniform(T: int, start: int = 0, spare: int = 0, window: int | None = None) -> AttentionMask:
    return attention_mask_of(torch.arange(start, start + T)[None], start, start + T + spare, window)


def own_starts(T: int, spare: int = 0, window: int | None = None) -> AttentionMask:
    start = torch.tensor([0, 3, 5])
    return attention_mask_of(start[:, None] + torch.arange(T), start, 5 + T + spare, window)


def custom(mask: Tensor) -> AttentionMask:
    T, S = mask.shape[-2:]
    return attention_mask_of(torch.arange(T)[None], 0, S, None, mask)


def some_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


CASES = {
    "prompt": lambda: (6, 6, uniform(6)),
    "step": lambda: (1, 6, uniform(1, start=5)),
    "chunk": lambda: (3, 8, uniform(3, start=5)),
    "preallocated-prompt": lambda: (4, 9, uniform(4, spare=5)),
    "preallocated-step": lambda: (1, 9, uniform(1, start=3, spare=5)),
    "window": lambda: (7, 7, uniform(7, window=3)),
    "window-1": lambda: (4, 4, uniform(4, window=1)),
    "window-step": lambda: (1, 8, uniform(1, start=7, window=3)),
    "window-chunk": lambda: (3, 8, uniform(3, start=5, window=4)),
    "window-preallocated": lambda: (3, 12, uniform(3, start=5, spare=4, window=4)),
    "own-starts": lambda: (2, 7, own_starts(2)),
    "own-starts-step": lambda: (1, 6, own_starts(1)),
    "own-starts-preallocated": lambda: (2, 11, own_starts(2, spare=4)),
    "own-starts-window": lambda: (3, 8, own_starts(3, window=2)),
}
CUSTOM = {
    "bool-rows": lambda: (4, 6, custom(some_mask((B, 1, 4, 6)))),
    "bool-shared": lambda: (4, 6, custom(some_mask((1, 1, 4, 6)))),
    "bool-heads": lambda: (4, 6, custom(some_mask((B, 4, 4, 6)))),
    "float": lambda: (4, 6, custom(torch.randn(B, 1, 4, 6))),
    "float-heads": lambda: (4, 6, custom(torch.randn(1, 4, 4, 6))),
    "float-minus-inf": lambda: (
        4,
        6,
        custom(torch.zeros(B, 1, 4, 6).masked_fill(~some_mask((B, 1, 4, 6)), -torch.inf)),
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention one number at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = mask[b, 0, t].nonzero()[:, 0]
                keys, values = k[b, h // groups, seen].double(), v[b, h // groups, seen].double()
                weights = (keys @ q[b, h, t].double() * SCALE).softmax(dim=0)
                out[b, h, t] = weights @ values
    return out


@HEADS
@pytest.mark.parametrize("backend", [eager, sdpa], ids=["eager", "sdpa"])
def test_the_formula(backend: Any, H: int, K: int) -> None:
    T, S, seen = CASES["own-starts-window"]()
    q, k, v = tensors(H, K, T, S)
    out, _ = backend(q, k, v, seen, scale=SCALE, dropout=0.0)
    torch.testing.assert_close(out.double(), by_hand(q, k, v, seen.entries), rtol=1e-5, atol=1e-6)


@HEADS
@pytest.mark.parametrize("case", (CASES | CUSTOM).values(), ids=CASES | CUSTOM)
def test_sdpa_equals_eager(case: Any, H: int, K: int) -> None:
    T, S, seen = case()
    q, k, v = (x.requires_grad_() for x in tensors(H, K, T, S))
    expected, weights = eager(q, k, v, seen, scale=SCALE, dropout=0.0)
    out, none = sdpa(q, k, v, seen, scale=SCALE, dropout=0.0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert none is None
    assert weights is not None
    assert weights.shape == (B, H, T, S)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, H, T))
    direction = torch.randn(out.shape)
    for mine, other in zip(
        torch.autograd.grad(out, (q, k, v), direction),
        torch.autograd.grad(expected, (q, k, v), direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", (CASES | CUSTOM).values(), ids=CASES | CUSTOM)
def test_what_is_no_number_shows(case: Any, dtype: torch.dtype, H: int, K: int) -> None:
    T, S, mask = case()
    options: dict[str, Any] = {"scale": SCALE, "dropout": 0.0}
    for value in (torch.nan, torch.inf):
        q, k, v = tensors(H, K, T, S, dtype)
        q[1, 2, -1, 3] = value
        shown = sdpa(q, k, v, mask, **options)[0].isnan()
        assert torch.equal(shown, eager(q, k, v, mask, **options)[0].isnan())
        assert shown[1, 2, -1].all()
        assert shown.sum() == D
    q, k, v = tensors(H, K, T, S, dtype)
    k[1, K - 1, :, 5] = torch.nan
    shown = sdpa(q, k, v, mask, **options)[0].isnan()
    assert torch.equal(shown, eager(q, k, v, mask, **options)[0].isnan())
    assert shown[1, H - 1].all()


def test_eager_masks_and_weights() -> None:
    q, k, v = tensors(4, 2, 5, 5)
    _, weights = eager(q, k, v, uniform(5), scale=SCALE, dropout=0.0)
    assert weights is not None
    assert not weights.triu(1).any()
    blind = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    blind[..., 2, :] = False
    out, _ = eager(q, k, v, custom(blind), scale=SCALE, dropout=0.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", [eager, sdpa], ids=["eager", "sdpa"])
def test_half_precision_keeps_its_dtype(backend: Any) -> None:
    q, k, v = tensors(4, 2, 6, 6, torch.bfloat16)
    for seen in (uniform(6), uniform(6, window=3), custom(torch.randn(1, 1, 6, 6))):
        out, _ = backend(q, k, v, seen, scale=SCALE, dropout=0.0)
        exact, _ = eager(q.float(), k.float(), v.float(), seen, scale=SCALE, dropout=0.0)
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
        assert out.dtype == torch.bfloat16


# -- flash-attn ------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Axes (B, T, H, D); query i of T is at key i + S - T and sees `window_size` around it."""
    assert dropout_p == 0.0
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32)
    return flash_attn_with_kvcache(
        q, k, v, None, None, None, None, lengths, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The same over the first `cache_seqlens` keys of each row."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert cache_seqlens is not None
    assert cache_seqlens.dtype == torch.int32
    assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
    T, S = q.shape[1], k_cache.shape[1]
    places = torch.arange(T)[None] + cache_seqlens[:, None] - T  # (B, T)
    offset = torch.arange(S) - places[..., None]  # (B, T, S)
    left, right = window_size
    seen = torch.arange(S) < cache_seqlens[:, None, None]
    if causal:
        right = 0
    if left >= 0:
        seen = seen & (offset >= -left)
    if right >= 0:
        seen = seen & (offset <= right)
    groups = q.shape[2] // k_cache.shape[2]
    keys = k_cache.float().repeat_interleave(groups, dim=2)
    values = v_cache.float().repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), keys) * (softmax_scale or D**-0.5)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, values).to(q.dtype)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.__dict__["flash_attn_func"] = flash_attn_func
    module.__dict__["flash_attn_with_kvcache"] = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@HEADS
@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.usefixtures("package")
def test_flash_equals_eager(case: Any, H: int, K: int, dtype: torch.dtype) -> None:
    T, S, seen = case()
    q, k, v = tensors(H, K, T, S, dtype)
    if isinstance(seen.start, int):  # what lies behind may be anything
        k[:, :, seen.start + T :] = v[:, :, seen.start + T :] = 1e4
    out, weights = attention_backend("flash_attention_2")(q, k, v, seen, scale=SCALE, dropout=0.0)
    exact, _ = eager(q.float(), k.float(), v.float(), seen, scale=SCALE, dropout=0.0)
    assert weights is None
    assert out.shape == q.shape
    torch.testing.assert_close(out, exact.to(dtype), rtol=2**-7, atol=2**-9)


@pytest.mark.usefixtures("package")
def test_flash_refuses_what_its_kernels_lack() -> None:
    half = tensors(4, 2, 4, 4, torch.bfloat16)
    with pytest.raises(UnsupportedBackendError, match="4-D attention_mask; use 'sdpa'"):
        flash(*half, custom(some_mask((B, 1, 4, 4))), scale=SCALE, dropout=0.0)
    with pytest.raises(UnsupportedBackendError, match=r"not torch\.float32; .*dtype='bfloat16'"):
        flash(*tensors(4, 2, 4, 4), uniform(4), scale=SCALE, dropout=0.0)


@pytest.mark.usefixtures("package")
def test_flash_does_not_train_where_it_has_no_gradients() -> None:
    q, k, v = tensors(4, 2, 2, 7, torch.bfloat16)
    seen = own_starts(2)
    with pytest.raises(UnsupportedBackendError, match="no gradients and no dropout"):
        flash(q, k, v, seen, scale=SCALE, dropout=0.1)
    q.requires_grad_()
    with pytest.raises(UnsupportedBackendError, match="no gradients"):
        flash(q, k, v, seen, scale=SCALE, dropout=0.0)
    with torch.no_grad():
        flash(q, k, v, seen, scale=SCALE, dropout=0.0)


def test_backends_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_backend("eager") is eager
    assert attention_backend("sdpa") is sdpa
    assert list(BACKENDS) == ["eager", "sdpa", "flash_attention_2"]
    with pytest.raises(UnsupportedBackendError, match=r"'flash' .*'flash_attention_2'"):
        attention_backend("flash")
    monkeypatch.setattr("quintet.ops.attention.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install flash-attn"):
        attention_backend("flash_attention_2")


@pytest.mark.parametrize(("T", "K"), [(1, 4), (3, 4), (40, 4), (67, 2)])
def test_training_in_bfloat16_attends_in_blocks_with_the_same_gradient(T: int, K: int) -> None:
    q, k, v = (torch.randn(2, heads, T, 8) for heads in (4, K, K))
    seen = AttentionMask(None, True, 0, None)
    told, made = [], []
    for found, dtype, backend in ((told, torch.float32, eager), (made, torch.bfloat16, sdpa)):
        inputs = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k, v)]
        out, _ = backend(*inputs, seen, scale=0.3, dropout=0.0)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        found += [out, *(x.grad for x in inputs)]
    for one, other in zip(made, told, strict=True):
        assert relative_error(one.float(), other) < 0.02


def test_blocks_give_way_where_there_is_no_gradient_or_the_text_is_long() -> None:
    x = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert in_blocks(x)
    with torch.no_grad():
        assert not in_blocks(x)
    assert not in_blocks(x.detach())
    assert not in_blocks(x.float())
    assert not in_blocks(x.expand(1, 1, 4, 8).repeat(1, 1, 400, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_blocks(x.float())
