from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.linear import Matrix
from quintet.kernels.parts import MLP, Attention, Norm, Part, Tokens
from quintet.kernels.stack import Stack
from quintet.ops.quantized import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from support import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
# Vectors are rounded to 16 bits for integers.
QUANTIZED_BOUND = {torch.float32: 2**-13, torch.bfloat16: 2**-6}
KINDS = ("plain", "int8", "int4")


def held(kind: str, O: int, I: int, dtype: torch.dtype, bias: bool) -> tuple[Matrix, Tensor]:
    """A random matrix as a kernel reads it, and the numbers it stands for."""
    weight = torch.randn(O, I) / I**0.5
    b = torch.randn(O).to(dtype) if bias else None
    if kind == "plain":
        w = weight.to(dtype)
        return Matrix(w, None, b), w.double()
    if kind == "int8":
        q, scale = quantize_int8(weight)
        return Matrix(q, scale, b), dequantize_int8(q, scale, torch.float64)
    q, scale = quantize_int4(weight)
    return Matrix(q, scale, b), dequantize_int4(q, scale, I, torch.float64)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


Held = list[tuple[Tensor, Tensor]]


def definition(
    x: Tensor,
    blocks: list[Block],
    held_: Held,
    numbers: list[list[Tensor]],
    cos: Tensor,
    sin: Tensor,
    starts: list[int],
    scale: float,
    eps: float,
) -> Tensor:
    """The formulas, in float64, a row at a time."""
    rows = []
    for b, start in enumerate(starts):
        y = x[b].double()  # (T, C)
        T = len(y)
        c, s = (a[b if len(a) > 1 else 0].double() for a in (cos, sin))
        for block, (old_k, old_v), ws in zip(blocks, held_, numbers, strict=True):
            wq, wk, wv, wo, wg, wu, wd = ws
            K, D = old_k.shape[1], old_k.shape[3]
            n = norm(y, block.attention_norm, eps)
            q, k, v = (
                (n @ w.T + (0 if m.bias is None else m.bias.double()))
                .view(T, -1, D)
                .transpose(0, 1)
                for w, m in zip((wq, wk, wv), block.qkv, strict=True)
            )
            q, k = rotated(q, c, s), rotated(k, c, s)
            keys = torch.cat((old_k[b, :, :start].double(), k), dim=1)
            values = torch.cat((old_v[b, :, :start].double(), v), dim=1)
            keys, values = (z.repeat_interleave(len(q) // K, dim=0) for z in (keys, values))
            scores = q @ keys.mT * scale
            at = torch.arange(start, start + T)[:, None] - torch.arange(start + T)
            seen = (at >= 0) & (at < (block.window or start + T + 1))
            out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
            y = y + out.transpose(0, 1).reshape(T, -1) @ wo.T
            n = norm(y, block.mlp_norm, eps)
            y = y + (torch.nn.functional.silu(n @ wg.T) * (n @ wu.T)) @ wd.T
        rows.append(y)
    return torch.stack(rows)


def make(
    kind: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    C: int,
    F: int,
    K: int,
    G: int,
    D: int,
    starts: list[int],
    window: int | None,
    layers: int = 2,
) -> tuple[list[Block], Held, list[list[Tensor]], Tensor, Tensor, Tensor]:
    blocks, buffers, numbers = [], [], []
    S = max(starts) + T + 3
    for _ in range(layers):
        shapes = [(K * G * D, C), (K * D, C), (K * D, C), (C, K * G * D), (F, C), (F, C), (C, F)]
        made = [held(kind, O, I, dtype, i < 3) for i, (O, I) in enumerate(shapes)]
        q, k, v, o, gate, up, down = (m for m, _ in made)
        norms = [(1 + 0.2 * torch.randn(C)).to(dtype) for _ in range(2)]
        keys, values = (torch.randn(B, K, S, D).to(dtype) for _ in range(2))
        for b, start in enumerate(starts):
            # What lies behind must not be read before it is written.
            keys[b, :, start:], values[b, :, start:] = torch.nan, torch.nan
        blocks.append(Block(norms[0], (q, k, v), o, norms[1], gate, up, down, window))
        buffers.append((keys, values))
        numbers.append([w for _, w in made])
    angles = torch.randn(B, T, D // 2).repeat(1, 1, 2)
    return (
        blocks,
        buffers,
        numbers,
        torch.randn(B, T, C).to(dtype),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    starts=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    T=st.integers(1, 2),
    C=st.sampled_from([64, 100, 192]),
    F=st.sampled_from([72, 256]),
    K=st.integers(1, 3),
    G=st.integers(1, 5),
    D=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 30]),
    threads=st.integers(1, 5),
)
def test_layers_in_one_call_are_what_the_formulas_say(
    level: str,
    dtype: torch.dtype,
    kind: str,
    starts: list[int],
    T: int,
    C: int,
    F: int,
    K: int,
    G: int,
    D: int,
    window: int | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(C + F + K + T)
    B = len(starts)
    blocks, buffers, numbers, x, cos, sin = make(kind, dtype, B, T, C, F, K, G, D, starts, window)
    exact = definition(x, blocks, buffers, numbers, cos, sin, starts, 0.2, 1e-6)
    before = x.clone()
    layers = Stack.of(blocks, head_dim=D, dtype=dtype)
    assert layers is not None
    made = layers.run(x, buffers, cos, sin, starts=starts, scale=0.2, eps=1e-6)
    assert made is not None
    assert torch.equal(x, before)
    bound = BOUND if kind == "plain" else QUANTIZED_BOUND
    assert relative_error(made.double(), exact) <= bound[dtype]
    for b, start in enumerate(starts):
        assert buffers[0][0][b, :, start : start + T].isfinite().all()
        assert buffers[0][0][b, :, start + T :].isnan().all()


def test_what_it_cannot_do_is_left_to_the_layers(level: str) -> None:
    def run(change: str = "", keys: Tensor | None = None, **fields: Any) -> Tensor | None:
        blocks, buffers, _, x, cos, sin = make(
            "plain", torch.float32, 1, 1, 64, 72, 1, 2, 16, [4], None
        )
        blocks[1] = blocks[1]._replace(**fields)
        layers = Stack.of(blocks, head_dim=16, dtype=torch.float32)
        if layers is None:
            return None
        if change == "gradient":
            x.requires_grad_()
        if change == "half":
            x = x.half()
        if change == "angles":
            cos = cos[..., :8]
        if keys is not None:
            buffers[1] = keys, buffers[1][1]
        starts = [100] if change == "no room" else [4]
        x = x.expand(1, 17, 64) if change == "many" else x
        return layers.run(x, buffers, cos, sin, starts=starts, scale=1.0, eps=1e-6)

    assert run() is not None
    for change in ("gradient", "half", "angles", "no room", "many"):
        assert run(change) is None, change
    weight = torch.randn(72, 64)
    assert run(gate=Matrix(weight)) is not None
    assert run(gate=Matrix(weight, None, torch.randn(72))) is None
    assert run(gate=Matrix(weight.bfloat16())) is None
    assert run(gate=Matrix(weight[:71])) is None
    assert run(gate=Matrix(torch.randn(64, 72).T)) is None
    assert run(mlp_norm=torch.ones(63)) is None
    assert run(keys=torch.zeros(1, 1, 8, 32)) is None
    assert run(keys=torch.zeros(1, 1, 4, 16)) is None
    trained = Matrix(torch.randn(72, 64, requires_grad=True))
    with torch.no_grad():
        assert run(gate=trained) is not None
    assert run(gate=trained) is None
