"""What is stacked in a model is apart on disk, and comes back the same to the last bit."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.checkpoint import Checkpoint, StackExperts, pieces, save, split_tensors

RULES = (
    StackExperts("experts.gate_up", ("experts.{}.gate.weight", "experts.{}.up.weight")),
    StackExperts("experts.down", ("experts.{}.down.weight",)),
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


def join(shapes: dict[str, tuple[int, ...]], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Build a model's tensors from those on disk, by the rules read backwards."""
    tensors = {}
    for name, shape in shapes.items():
        parts = pieces(name, shape, RULES)
        tensors[name] = torch.empty(shape, dtype=held[parts[0].name].dtype)
        for piece in parts:
            assert held[piece.name].shape == piece.shape
            piece.of(tensors[name]).copy_(held[piece.name])
    return tensors


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Layers with and without experts, of random sizes, dtypes and bytes."""
    size = st.integers(1, 5)
    E, C, F = draw(size), draw(size), draw(size)
    prefix = draw(st.sampled_from(["", "model.", "transformer.deep."]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    tensors = {}
    for layer in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        shapes = {"mlp.down.weight": (C, F), "experts_norm.weight": (C,)}
        if draw(st.booleans()):
            shapes = {"mlp.experts.gate_up": (E, 2 * F, C), "mlp.experts.down": (E, C, F)}
        for name, shape in shapes.items():
            bits = torch.randint(
                256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator
            )
            tensors[f"{prefix}layers.{layer}.{name}"] = bits.to(torch.uint8).view(dtype)
    return tensors


@settings(max_examples=60, deadline=None)
@given(tensors=models(), shard=st.integers(1, 400))
def test_saving_and_loading_is_the_identity(tensors: dict[str, Tensor], shard: int) -> None:
    """Names, shapes, dtypes and bytes, whatever the files an expert's parts fall into."""
    with TemporaryDirectory() as directory:
        save(directory, dict(split_tensors(tensors, RULES)), max_shard_size=shard)
        checkpoint = Checkpoint.open(directory)
        held = {name: t.clone() for name, t in checkpoint.read(checkpoint.tensors)}
    assert not any(name.endswith((".gate_up", ".down")) for name in held)
    back = join({name: tuple(t.shape) for name, t in tensors.items()}, held)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


def test_parts_are_named_and_placed_in_order() -> None:
    found = pieces("layers.0.mlp.experts.gate_up", (2, 6, 5), RULES)
    assert [(piece.name, piece.shape, piece.place) for piece in found] == [
        ("layers.0.mlp.experts.0.gate.weight", (3, 5), (0, slice(0, 3))),
        ("layers.0.mlp.experts.0.up.weight", (3, 5), (0, slice(3, 6))),
        ("layers.0.mlp.experts.1.gate.weight", (3, 5), (1, slice(0, 3))),
        ("layers.0.mlp.experts.1.up.weight", (3, 5), (1, slice(3, 6))),
    ]


@pytest.mark.parametrize(
    "name", ["experts.down.weight", "shared_experts.down", "experts.0.down.weight", "down"]
)
def test_names_that_only_resemble_a_stack_stay(name: str) -> None:
    (piece,) = pieces(name, (2, 3), RULES)
    assert (piece.name, piece.shape, piece.place) == (name, (2, 3), None)


def test_a_stack_that_its_parts_cannot_share_is_refused() -> None:
    with pytest.raises(AssertionError, match=re.escape("experts.gate_up (2, 5, 4)")):
        pieces("experts.gate_up", (2, 5, 4), RULES)


def test_nothing_is_copied_to_save() -> None:
    stacked = torch.randn(3, 4, 5)
    parts = dict(split_tensors({"mlp.experts.gate_up": stacked}, RULES))
    assert len(parts) == 6
    storages = {part.untyped_storage().data_ptr() for part in parts.values()}
    assert storages == {stacked.untyped_storage().data_ptr()}


def test_the_parts_of_an_expert_can_be_in_any_file(tmp_path: Path) -> None:
    tensors = {
        "mlp.experts.gate_up": torch.randn(3, 4, 5),
        "mlp.experts.down": torch.randn(3, 5, 2),
    }
    save(tmp_path, dict(split_tensors(tensors, RULES)), max_shard_size=50)
    checkpoint = Checkpoint.open(tmp_path)
    files = {checkpoint.tensors[f"mlp.experts.0.{part}.weight"].file for part in ("gate", "up")}
    assert len(files) == 2
    held = dict(checkpoint.read(checkpoint.tensors))
    back = join({name: tuple(t.shape) for name, t in tensors.items()}, held)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
