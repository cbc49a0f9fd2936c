"""Weights in 8 and 4 bits and in FP8 blocks, against the formulas element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import InputError
from quintet.ops.quantized import (
    dequantize_fp8,
    dequantize_int4,
    dequantize_int8,
    fp8_scale_shape,
    int4_linear,
    int4_shapes,
    int8_linear,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)

SHAPES = [(5, 64), (7, 33), (1, 1), (3, 4, 130), (300, 1200)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of them zero where there are several."""
    torch.manual_seed(3)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    weight[..., shape[-2] // 2, :] = 0 if shape[-2] > 1 else 1
    return weight.to(dtype)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    q, scale = quantize_int8(weight)
    assert (q.dtype, q.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, weight.shape[:-1])
    assert torch.equal(scale, weight.float().abs().amax(-1) / 127)
    assert int(q.min()) >= -127
    back = dequantize_int8(q, scale, torch.float64)
    error = (back - weight.double()).abs()
    assert bool((error <= scale.double()[..., None] * 0.50002).all())
    assert torch.equal(back, (q.float() * scale[..., None]).double())


def to_the_end(weight: torch.Tensor) -> torch.Tensor:
    """Groups of 64 rounded with the scale that makes -8 of the number of largest magnitude."""
    columns = weight.shape[-1]
    groups = torch.nn.functional.pad(weight, (0, -columns % 64)).unflatten(-1, (-1, 64))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).to(torch.bfloat16).float()
    levels = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
    return (levels * scale).flatten(-2)[..., :columns]


@each_shape
def test_int4_has_the_nearest_levels_of_scales_that_lose_the_least(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    packed, scale = quantize_int4(weight)
    assert (tuple(packed.shape), tuple(scale.shape)) == int4_shapes(shape)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
    back = dequantize_int4(packed, scale, shape[-1], torch.float32)
    steps = scale.float().repeat_interleave(64, dim=-1)[..., : shape[-1]]
    levels = (weight / torch.where(steps == 0, 1.0, steps)).round().clamp(-8, 7)
    assert torch.equal(back, levels * steps)

    def lost(decoded: torch.Tensor) -> torch.Tensor:
        pad = (0, -shape[-1] % 64)
        error, x = (
            torch.nn.functional.pad(one, pad).unflatten(-1, (-1, 64))
            for one in (decoded - weight, weight)
        )
        importance = (x.square() + x.square().mean(-1, keepdim=True)).sqrt()
        return (importance * error.square()).sum(-1)

    plain = lost(to_the_end(weight))
    assert bool((lost(back) <= plain * 1.00001).all())
    if weight.numel() > 10_000:
        assert lost(back).sum() < 0.95 * plain.sum()


def test_int4_packs_a_groups_first_half_low_and_its_second_half_high() -> None:
    levels = torch.randint(0, 16, (3, 128))
    levels[:, [5, 70]] = 0
    weight = (levels - 8) * 0.5
    packed, scale = quantize_int4(weight)
    assert torch.equal(scale.float(), torch.full((3, 2), 0.5))
    for group in range(2):
        for j in range(32):
            low, high = levels[:, 64 * group + j], levels[:, 64 * group + 32 + j]
            assert torch.equal(packed[:, 32 * group + j].long(), low + 16 * high)
    assert torch.equal(dequantize_int4(packed, scale, 128, torch.float32), weight)


def test_int4_fills_rows_up_with_zeros() -> None:
    packed, scale = quantize_int4(torch.ones(2, 70))
    full = dequantize_int4(packed, scale, 128, torch.float32)
    assert not full[:, 70:].any()
    assert bool((full[:, :70] == 1).all())


@pytest.mark.parametrize("shape", [(576, 256), (128, 128), (5, 3), (2, 129, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_blocks_dequantise_by_the_formula_to_the_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    q = torch.randn(shape).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(fp8_scale_shape(shape)) * 1e-3
    expected = torch.empty(shape, dtype=dtype)
    for row in range(shape[-2]):
        for start in range(0, shape[-1], 128):
            columns = slice(start, start + 128)
            by = scale_inv[..., row // 128, start // 128, None]
            expected[..., row, columns] = (q[..., row, columns].float() * by).to(dtype)
    assert torch.equal(dequantize_fp8(q, scale_inv, dtype), expected)


def test_the_last_blocks_of_a_576_row_weight_have_64_rows() -> None:
    assert fp8_scale_shape((576, 7168)) == (5, 56)
    q = torch.ones(576, 128).to(torch.float8_e4m3fn)
    weight = dequantize_fp8(q, torch.arange(5.0)[:, None], torch.float32)
    assert torch.equal(weight[:, 0], torch.arange(576) // 128 * 1.0)


@pytest.mark.parametrize("shape", [(576, 256), (100, 70), (2, 130, 128)], ids=str)
def test_fp8_uses_the_whole_range_and_loses_a_sixteenth_at_most(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    q, scale_inv = quantize_fp8(weight)
    assert (scale_inv.dtype, tuple(scale_inv.shape)) == (torch.float32, fp8_scale_shape(shape))
    back = dequantize_fp8(q, scale_inv, torch.float32)
    step = scale_inv.repeat_interleave(128, -1).repeat_interleave(128, -2)
    step = step[..., : shape[-2], : shape[-1]] * 2**-9
    assert bool(((back - weight).abs() <= torch.maximum(weight.abs() / 16, step) * 1.0001).all())
    assert float(q.float().abs().max()) == 448
    # What is representable comes back as it was.
    again, scales = quantize_fp8(back)
    assert torch.equal(dequantize_fp8(again, scales, torch.float32), back)


def test_fp8_scales_of_other_blocks_are_refused() -> None:
    q = torch.zeros(576, 128).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"\[5, 1\], not \[4, 1\]"):
        dequantize_fp8(q, torch.ones(4, 1), torch.float32)


@pytest.mark.parametrize("quantise", [quantize_int8, quantize_int4, quantize_fp8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(quantise: object, bad: float) -> None:
    weight = torch.ones(200, 200)
    weight[150, 150] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        quantise(weight)  # type: ignore[operator]


@each_shape
def test_a_stack_is_quantised_like_its_parts(shape: tuple[int, ...]) -> None:
    whole = weight_of((3, *shape[-2:]))
    for quantise in (quantize_int8, quantize_int4, quantize_fp8):
        for stacked, parts in zip(
            quantise(whole), zip(*(quantise(part) for part in whole), strict=True), strict=True
        ):
            for one, part in zip(stacked, parts, strict=True):
                assert torch.equal(one, part)


def test_a_transposed_weight_is_read_by_its_rows() -> None:
    weight = torch.randn(70, 40)
    for quantise in (quantize_int8, quantize_int4, quantize_fp8):
        for one, other in zip(quantise(weight.T), quantise(weight.T.contiguous()), strict=True):
            assert torch.equal(one, other)


def close(made: torch.Tensor, expected: torch.Tensor) -> bool:
    # A kernel takes vectors in 16 bits and rounds once, where here each number is rounded too.
    bound = {torch.float32: 2**-13, torch.bfloat16: 2**-7}[made.dtype]
    return bool((made - expected).abs().max() <= bound * expected.abs().max().clamp(min=1))


@given(st.integers(1, 90), st.integers(1, 200), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_linears_multiply_with_what_is_stored(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, x, bias = (
        torch.randn(rows, columns),
        torch.randn(3, 2, columns).to(dtype),
        torch.randn(rows).to(dtype),
    )
    q, scale = quantize_int8(weight)
    expected = torch.nn.functional.linear(x, (q * scale[:, None]).to(dtype), bias)
    made = int8_linear(x, q, scale, bias)
    assert close(made, expected)
    packed, scale = quantize_int4(weight)
    expected = torch.nn.functional.linear(x, dequantize_int4(packed, scale, columns, dtype), bias)
    assert close(int4_linear(x, packed, scale, bias), expected)
