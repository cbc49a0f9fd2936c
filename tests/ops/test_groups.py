"""Weights in groups, against the formulas element by element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import InputError
from quintet.kernels.matrix import Matrix
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import (
    IQ4,
    group_count,
    group_size,
    number_shape,
    pack_numbers,
    unpack_numbers,
    widen_groups,
)
from quintet.ops.quantized import decode, quantized_linears
from support import relative_error

SHAPES = [(5, 64), (7, 33), (1, 1), (3, 4, 130), (30, 1200)]
GROUPS = [16, 32, 64, 128, None]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Bits, whether there are offsets, and whether numbers are places in a table.
KINDS = [(4, False, False), (4, True, False), (4, False, True), (8, False, False), (8, True, False)]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def weight_of(shape: tuple[int, ...]) -> torch.Tensor:
    """Rows of very different sizes, one of them zero where there are several."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]
    weight[..., shape[-2] // 2, :] = 0 if shape[-2] > 1 else 1
    return weight


@given(st.integers(1, 3000), st.sampled_from([16, 32, 64, 128, 256, 1024]))
def test_how_many_groups_there_are_tells_their_size(columns: int, group: int) -> None:
    count = group_count(columns, group)
    size = group_size(columns, count)
    assert [i // size for i in range(columns)] == [i // group for i in range(columns)]


@pytest.mark.parametrize(("columns", "count"), [(96, 4), (100, 101), (64, 0), (64, -1)])
def test_as_many_groups_as_no_size_makes_are_refused(columns: int, count: int) -> None:
    with pytest.raises(InputError, match=f"have {count} groups"):
        group_size(columns, count)


@given(st.integers(1, 200))
@settings(max_examples=20)
def test_of_64_neighbours_a_byte_has_one_of_each_half(columns: int) -> None:
    numbers = torch.randint(0, 16, (3, columns))
    packed = pack_numbers(numbers)
    assert tuple(packed.shape) == number_shape((3, columns), 4)
    for i in range(columns):
        byte = packed[:, i // 64 * 32 + i % 32].long()
        half = byte >> 4 if i % 64 >= 32 else byte & 15
        assert torch.equal(half, numbers[:, i])
    assert torch.equal(unpack_numbers(packed, columns).long(), numbers)


@each_kind
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_what_the_formula_says_to_the_bit(
    kind: tuple[int, bool, bool], group: int | None, dtype: torch.dtype
) -> None:
    bits, has_offset, iq4 = kind
    O, I = 4, 150
    torch.manual_seed(1)
    n = torch.randint(0, 16, (O, I)) if bits == 4 else torch.randint(-128, 128, (O, I))
    weight = pack_numbers(n) if bits == 4 else n.to(torch.int8)
    scale = torch.randn(O, group_count(I, group)).to(dtype)
    offset = torch.randn_like(scale) if has_offset else None
    made = widen_groups(weight, scale, offset, I, iq4=iq4)
    for o in range(O):
        for i in range(I):
            g = 0 if group is None else i // group
            number = IQ4[n[o, i]] if iq4 else int(n[o, i])
            number -= 8 if bits == 4 and not has_offset and not iq4 else 0
            expected = torch.tensor(float(number)) * scale[o, g].float()
            expected = expected if offset is None else expected + offset[o, g].float()
            assert made[o, i] == expected


@each_shape
@each_kind
@pytest.mark.parametrize("group", [32, 128, None], ids=str)
def test_rounding_is_off_by_half_a_step_on_average_of_a_group(
    shape: tuple[int, ...], kind: tuple[int, bool, bool], group: int | None
) -> None:
    bits, has_offset, iq4 = kind
    weight = weight_of(shape)
    numbers, scale, offset = quantize_groups(
        weight, bits, group, offset=has_offset, dtype=torch.float32, iq4=iq4
    )
    assert tuple(numbers.shape) == number_shape(shape, bits)
    assert scale.shape == (*shape[:-1], group_count(shape[-1], group))
    back = widen_groups(numbers, scale, offset, shape[-1], iq4=iq4)
    largest = torch.zeros_like(scale)
    size = group or shape[-1]
    for g in range(scale.shape[-1]):
        own = weight[..., g * size : (g + 1) * size]
        span = own.amax(-1) - own.amin(-1) if has_offset else own.abs().amax(-1)
        largest[..., g] = span
    # Half of the widest gap between two levels; the last one of them is on one side only.
    step = 1 / (2 if has_offset else 1) / (15 if has_offset else 7) if bits == 4 else 1 / 254
    for g in range(scale.shape[-1]):
        own = slice(g * size, (g + 1) * size)
        error = (back - weight)[..., own].square().mean(-1).sqrt()
        assert bool((error <= largest[..., g] * step * 1.001).all())


@each_kind
def test_what_is_on_the_levels_comes_back_as_it_was(kind: tuple[int, bool, bool]) -> None:
    bits, has_offset, iq4 = kind
    torch.manual_seed(2)
    least, most = (0, 15) if bits == 4 else (-127 if not has_offset else -128, 127)
    n = torch.randint(least, most + 1, (6, 256))
    n[:, ::32], n[:, 1::32] = least, most
    weight = pack_numbers(n) if bits == 4 else n.to(torch.int8)
    scale = torch.rand(6, 8).to(torch.float16)
    offset = -3 * scale if has_offset else None
    exact = widen_groups(weight, scale, offset, 256, iq4=iq4)
    again = quantize_groups(exact, bits, 32, offset=has_offset, iq4=iq4)
    back = widen_groups(*again, 256, iq4=iq4)
    assert relative_error(back, exact) < 1e-6


def test_a_row_in_one_group_is_as_narrow_as_the_row() -> None:
    numbers, scale, _ = quantize_groups(torch.randn(3, 100), 8, None)
    assert (numbers.shape, scale.shape) == ((3, 100), (3, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_kind
def test_numbers_that_are_not_finite_are_refused(kind: tuple[int, bool, bool], bad: float) -> None:
    bits, has_offset, iq4 = kind
    weight = torch.ones(20, 200)
    weight[15, 150] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize_groups(weight, bits, 32, offset=has_offset, iq4=iq4)


def test_numbers_beyond_the_scales_dtype_are_refused() -> None:
    with pytest.raises(InputError, match="too large for scales in float16"):
        quantize_groups(torch.full((2, 32), 1e9), 8, 32)
    numbers, scale, _ = quantize_groups(torch.full((2, 32), 1e9), 8, 32, dtype=torch.float32)
    assert math.isclose(float(numbers[0, 0]) * float(scale[0, 0]), 1e9, rel_tol=1e-6)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_multiply_with_what_is_stored(
    kind: tuple[int, bool, bool], dtype: torch.dtype
) -> None:
    bits, has_offset, iq4 = kind
    for columns, group in ((70, 32), (200, 64), (33, None)):
        weight, x, bias = torch.randn(9, columns), torch.randn(3, 2, columns), torch.randn(9)
        numbers, scale, offset = quantize_groups(weight, bits, group, offset=has_offset, iq4=iq4)
        matrix = Matrix(numbers, scale, bias.to(dtype), offset, iq4)
        wide = decode(matrix, columns, torch.float32)
        expected = torch.nn.functional.linear(x.to(dtype).float(), wide, bias.to(dtype).float())
        (made,) = quantized_linears(x.to(dtype), [matrix])
        assert relative_error(made.float(), expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
