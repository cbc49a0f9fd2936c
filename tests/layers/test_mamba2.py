"""The Mamba-2 mixer against its equations, token by token."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from quintet.cache import Cache, RecurrentSlot, Segment
from quintet.layers.context import ForwardContext
from quintet.layers.mamba2 import GatedRMSNorm, Mamba2
from quintet.ops.attention import eager
from quintet.ops.ssd import recurrence

# Normalisation is in float32.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def mixer(**changes: Any) -> Mamba2:
    options: dict[str, Any] = {
        "state_size": 5,
        "num_groups": 2,
        "conv_kernel": 4,
        "conv_bias": True,
        "bias": True,
        "chunk_size": 4,
        "dt_limits": (0.001, float("inf")),
        "layer_idx": 0,
    }
    made = Mamba2(12, 4, 6, **(options | changes)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def step_of(x: Tensor, cache: Cache | None = None, counts: Tensor | None = None) -> ForwardContext:
    B, T, _ = x.shape
    segment = Segment(0, T, T, counts, x.device)
    if cache is not None:
        segment = cache.segment(B, T, x.device, counts)
    return ForwardContext(x, x, segment, (segment,), ({},), eager, cache, embeds=x)


def by_the_equations(m: Mamba2, x: Tensor) -> Tensor:
    z, xbc, dt = m.in_proj(x).split(m.in_sizes, dim=-1)
    xbc = torch.nn.functional.pad(xbc, (0, 0, m.conv1d.kernel_size[0] - 1, 0)).transpose(1, 2)
    xbc = torch.nn.functional.silu(m.conv1d(xbc)).transpose(1, 2)
    u, b, c = xbc.split([24, 10, 10], dim=-1)
    dt = torch.nn.functional.softplus(dt + m.dt_bias).clamp(*m.dt_limits)
    u, b, c = u.unflatten(2, (4, 6)), b.unflatten(2, (2, -1)), c.unflatten(2, (2, -1))
    y = recurrence(u, dt, -m.A_log.exp(), b, c, m.D, None)[0].flatten(2)
    y = (y * torch.nn.functional.silu(z)).unflatten(2, (2, 12))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return m.out_proj(y.flatten(2) * m.norm.weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="bias"),
        pytest.param({"bias": False, "conv_bias": False}, id="no-bias"),
        pytest.param({"dt_limits": (0.2, 0.9)}, id="limits"),
        pytest.param({"conv_kernel": 2, "chunk_size": 100}, id="short-conv"),
    ],
)
def test_equals_the_equations(changes: dict[str, Any]) -> None:
    m, x = mixer(**changes), torch.randn(2, 11, 12).double()
    assert_close(m(x, step_of(x)), by_the_equations(m, x))


@torch.no_grad()
def test_step_sizes_are_clamped_alike_in_prompts_and_steps() -> None:
    m, x = mixer(dt_limits=(0.4, 0.6)), torch.randn(2, 11, 12).double()
    cache = Cache([None], [RecurrentSlot()])
    parts = []
    for part in x.split([4, 1, 1, 3, 1, 1], dim=1):
        step = step_of(part, cache)
        parts.append(m(part, step))
        cache.advance(step.whole)
    assert_close(torch.cat(parts, dim=1), by_the_equations(m, x))


def test_rows_with_padding_behind_equal_rows_alone() -> None:
    m, x = mixer(), torch.randn(3, 9, 12).double()
    counts = torch.tensor([9, 1, 4])
    cache = Cache([None], [RecurrentSlot()])
    step = step_of(x, cache, counts)
    y = m(x, step)
    cache.advance(step.whole)
    more = torch.randn(3, 2, 12).double()
    after = m(more, step_of(more, cache))
    for row, count in enumerate(counts.tolist()):
        whole = torch.cat((x[row, :count], more[row]))[None]
        expected = by_the_equations(m, whole)[0]
        assert_close(torch.cat((y[row, :count], after[row])), expected)


def test_gradients_reach_through_the_cache() -> None:
    m, x = mixer(), torch.randn(1, 6, 12).double().requires_grad_()
    cache = Cache([None], [RecurrentSlot()])
    parts = []
    for part in (x[:, :3], x[:, 3:4], x[:, 4:5], x[:, 5:]):
        step = step_of(part, cache)
        parts.append(m(part, step))
        cache.advance(step.whole)
    made = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), x)[0]
    expected = torch.autograd.grad(by_the_equations(m, x).square().sum(), x)[0]
    assert_close(made, expected)


def test_a_step_changes_the_state_in_place() -> None:
    m, x = mixer(), torch.randn(1, 3, 12).double()
    slot = RecurrentSlot()
    cache = Cache([None], [slot])
    with torch.no_grad():
        for part in (x[:, :1], x[:, 1:2]):
            step = step_of(part, cache)
            m(part, step)
            cache.advance(step.whole)
            state, window = slot.state, slot.window
        step = step_of(x[:, 2:], cache)
        m(x[:, 2:], step)
    assert slot.state is state
    assert slot.window is window


def test_the_gated_norm_is_rounded_once() -> None:
    norm = GatedRMSNorm(8, 2).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    exact = GatedRMSNorm(8, 2)
    exact.load_state_dict({"weight": norm.weight.detach().float()})
    assert torch.equal(norm(x, z), exact(x, z.float()).bfloat16())


def test_the_scalars_of_the_recurrence_stay_in_float32() -> None:
    from families.zamba2 import model_of

    model = model_of()
    mixer = model.model.layers[0].mamba
    exact = mixer.A_log.detach().clone()
    for cast in (model.to(torch.bfloat16), model.half()):
        assert cast.model.layers[0].mamba.A_log.dtype == torch.float32
        assert torch.equal(mixer.A_log, exact)
        assert mixer.in_proj.weight.dtype != torch.float32
    assert mixer.to(torch.float64).A_log.dtype == torch.float64
