"""Rotary frequencies and angles are Transformers', and a rotation is one."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from quintet.configuration.rope import RopeParameters
from quintet.layers.rotary import RotaryEmbedding
from quintet.ops.rope import attention_factor, inverse_frequencies, rotary_angles, rotate

D, LENGTH = 16, 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta-1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn-length-of-the-model": {"rope_type": "yarn", "factor": 2.0},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-mscale-alone": {**YARN, "mscale": 0.707},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-untruncated": {**YARN, "truncate": False},
    "yarn-betas": {**YARN, "beta_fast": 16, "beta_slow": 2, "rope_theta": 150_000.0},
    "yarn-step": {**YARN, "original_max_position_embeddings": 4},
    "yarn-factor-1": {**YARN, "factor": 1.0},
    "llama3": LLAMA3,
    "llama3-1e5": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
}
PARAMETRISED = pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)


def parsed(values: dict[str, Any]) -> RopeParameters:
    return RopeParameters.parse(values, max_position_embeddings=LENGTH)


def their_config(values: dict[str, Any]) -> Any:
    return transformers.Qwen2Config(
        hidden_size=4 * D,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 10_000.0, **values},
    )


@PARAMETRISED
def test_frequencies_equal_transformers(values: dict[str, Any]) -> None:
    config = their_config(values)
    rope = parsed(config.rope_parameters)
    if values["rope_type"] == "default":
        expected, factor = Qwen2RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](config)
    torch.testing.assert_close(inverse_frequencies(rope, D), expected, rtol=3e-7, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


@PARAMETRISED
def test_angles_equal_transformers(values: dict[str, Any]) -> None:
    positions = torch.stack((torch.arange(40), torch.arange(23, 63)))
    theirs = Qwen2RotaryEmbedding(their_config(values))(torch.zeros(2, 40, D), positions)
    ours = RotaryEmbedding(D, parsed(values))(positions)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def dynamic(positions: Tensor) -> tuple[Tensor, Tensor]:
    return RotaryEmbedding(D, parsed({"rope_type": "dynamic", "factor": 2.0}))(positions)


@pytest.mark.parametrize("T", [1, LENGTH, LENGTH + 1, 3 * LENGTH], ids=lambda T: f"T{T}")
def test_dynamic_angles_equal_transformers(T: int) -> None:
    positions = torch.arange(T)[None]
    their = Qwen2RotaryEmbedding(their_config({"rope_type": "dynamic", "factor": 2.0}))
    for mine, other in zip(dynamic(positions), their(torch.zeros(1, T, D), positions), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_dynamic_angles_of_a_row_do_not_depend_on_other_rows_or_earlier_calls() -> None:
    short, long = torch.arange(100)[None] % 50, torch.arange(100)[None]
    together = dynamic(torch.cat((short, long)))
    for part, (row, rows) in enumerate(zip(dynamic(short), together, strict=True)):
        assert torch.equal(row[0], rows[0]), part
    for row, rows in zip(dynamic(long), together, strict=True):
        assert torch.equal(row[0], rows[1])
    rotary = RotaryEmbedding(D, parsed({"rope_type": "dynamic", "factor": 2.0}))
    rotary(long)
    assert torch.equal(rotary(short)[0], together[0][:1])
    assert not torch.equal(together[0][0, :50], together[0][1, :50])


def test_rotation_equals_transformers() -> None:
    q, k = torch.randn(2, 4, 9, D), torch.randn(2, 2, 9, D)
    cos, sin = RotaryEmbedding(D, parsed({}))(torch.arange(9)[None].expand(2, -1) + 5)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    # A kernel adds the two products with one rounding instead of two.
    torch.testing.assert_close(rotate(q, cos, sin), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotate(k, cos, sin), expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_a_rotation_keeps_norms(kind: str) -> None:
    cos, sin = RotaryEmbedding(D, parsed(KINDS[kind]))(torch.tensor([[0, 1, 77, 5000]]))
    x = torch.randn(1, 3, 4, D)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, cos, sin)[:, :, 0], x[:, :, 0])


@PARAMETRISED
def test_products_depend_on_the_distance_alone(values: dict[str, Any]) -> None:
    rotary = RotaryEmbedding(D, parsed(values))
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def product(query: int, key: int) -> float:
        q_rotated = rotate(q, *rotary(torch.tensor([[query]])))
        return float((q_rotated * rotate(k, *rotary(torch.tensor([[key]])))).sum())

    for query, key in ((9, 9), (20, 3), (3, 20)):
        assert product(query, key) == pytest.approx(product(query + 31, key + 31), abs=2e-4)
    assert product(9, 9) == pytest.approx(float((q * k).sum()) * rotary_scale(rotary), abs=2e-4)
    assert abs(product(20, 3) - product(3, 20)) > 1e-3


def rotary_scale(rotary: RotaryEmbedding) -> float:
    return attention_factor(rotary.rope) ** 2


def test_angles_are_float32_whatever_the_positions_are() -> None:
    rope = parsed({})
    frequencies = inverse_frequencies(rope, D)
    for dtype in (torch.int32, torch.int64):
        cos, _ = rotary_angles(torch.tensor([[2**20 + 1]], dtype=dtype), frequencies, rope)
        exact = ((2**20 + 1) * frequencies.double()).cos()
        torch.testing.assert_close(cos[0, 0, : D // 2].double(), exact, rtol=0, atol=0.04)
        assert cos.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_angles_of_a_step_are_those_of_its_positions(kind: str, dtype: torch.dtype) -> None:
    rotary = RotaryEmbedding(D, parsed(KINDS[kind]))
    with torch.inference_mode():
        rotary.following(0, 3, dtype)
    for start, T in ((0, 1), (5, 4), (700, 2), (3, 40), (5000, 1)):
        expected = [x.to(dtype) for x in rotary(torch.arange(start, start + T)[None])]
        with torch.no_grad():
            made = rotary.following(start, T, dtype)
        for one, other in zip(made, expected, strict=True):
            assert torch.equal(one, other)
            assert one.shape == (1, T, D)
    # What was made without gradients is not used with them: it could not be saved for a backward.
    x = torch.ones(1, 4, D, requires_grad=True)
    (x * rotary.following(5, 4, torch.float32)[0]).sum().backward()
    rotary.to(torch.bfloat16)
    with torch.no_grad():
        cos, _ = rotary.following(700, 2, torch.float32)
    assert torch.equal(cos, rotary(torch.arange(700, 702)[None])[0])
