"""Experts in checkpoints: stacked or apart, converted on the way, missing or misshapen."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from families.qwen2_moe import model_of
from quintet.checkpoint import Checkpoint, save
from quintet.errors import CheckpointError
from quintet.modeling.loading import NewHeadWarning
from quintet.models.qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeForQuestionAnswering,
    Qwen2MoeForSequenceClassification,
    Qwen2MoeModel,
)
from support import relative_error

TOLERANCE = 1e-5
IDS = torch.arange(1, 19).reshape(2, 9)
MLP = "model.layers.1.mlp"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: tensor.clone() for name, tensor in checkpoint.read(checkpoint.tensors)}


def rewrite(directory: Path, change: Any) -> None:
    """Save a checkpoint again with its tensors changed, its config as it is."""
    tensors = tensors_of(directory)
    change(tensors)
    save(directory, tensors)


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(1, 5),
    width=st.integers(1, 9),
    layers=st.integers(1, 3),
    step=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.integers(300, 20_000),
)
def test_saving_and_loading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    width: int,
    layers: int,
    step: int,
    dtype: torch.dtype,
    shard: int,
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    model = model_of(
        num_experts=experts,
        num_experts_per_tok=1,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        decoder_sparse_step=step,
        hidden_size=8,
        vocab_size=11,
    ).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    back = Qwen2MoeForCausalLM.from_pretrained(directory)
    before, after = model.state_dict(), back.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name


def test_on_disk_every_expert_has_its_own_tensors(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    found = Checkpoint.open(tmp_path).tensors
    stacks = [
        name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert not stacks
    for expert in range(6):
        for part, shape in (("gate", (20, 48)), ("up", (20, 48)), ("down", (48, 20))):
            assert found[f"{MLP}.experts.{expert}.{part}_proj.weight"].shape == shape


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj", ""])
def test_experts_that_are_stacked_on_disk_load_too(tmp_path: Path, part: str) -> None:
    """As the names in memory are, here and there: all of them, or one kind."""
    model = model_of()
    model.save_pretrained(tmp_path)
    stacked = {
        name: tensor for name, tensor in model.state_dict().items() if f".experts.{part}" in name
    }

    def change(tensors: dict[str, Tensor]) -> None:
        for name in stacked:
            kinds = ("down",) if name.endswith("down_proj") else ("gate", "up")
            for expert in range(6):
                for kind in kinds:
                    del tensors[f"{name.rpartition('.')[0]}.{expert}.{kind}_proj.weight"]
        tensors.update(stacked)

    rewrite(tmp_path, change)
    assert len(stacked) == (3 if part else 6)
    again = Qwen2MoeForCausalLM.from_pretrained(tmp_path, dtype="float64").state_dict()
    assert all(torch.equal(again[name], t.double()) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_experts_are_converted_on_the_way(tmp_path: Path, dtype: str) -> None:
    model = model_of()
    model.save_pretrained(tmp_path, max_shard_size="9KB")
    made = Qwen2MoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(getattr(torch, dtype))), name


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_a_device_map_of_one_device_is_taken(tmp_path: Path, device_map: Any) -> None:
    model_of().save_pretrained(tmp_path)
    made = Qwen2MoeForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    devices = {parameter.device.type for parameter in made.parameters()}
    assert devices == {"cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"}


class Allocated(TorchDispatchMode):
    """Adds up the bytes that operations allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and not func.is_view:
            given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
            if out.untyped_storage().data_ptr() not in given:
                self.nbytes += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_the_model_once(tmp_path: Path, dtype: str) -> None:
    model_of().save_pretrained(tmp_path, max_shard_size="20KB")
    with Allocated() as made:
        model = Qwen2MoeForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    final = sum(parameter.nbytes for parameter in model.parameters())
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    # What stays in the file's own dtype stays in the mapped file.
    assert experts < made.nbytes < (final if dtype == "bfloat16" else experts) + 10_000
    assert experts / 3 > 20_000


# -- what does not fit -----------------------------------------------------------------------


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Qwen2MoeForCausalLM.from_pretrained(directory)
    return str(caught.value)


def test_a_missing_expert_is_named_as_on_disk(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    name = f"{MLP}.experts.3.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    said = refused(tmp_path)
    assert "1 missing" in said
    assert f"{name}: expected [20, 48]" in said


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    name = f"{MLP}.experts.5.down_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48, 21)}))
    said = refused(tmp_path)
    assert "1 of another shape" in said
    assert f"{name}: expected [48, 20], found [48, 21]" in said


def test_a_stack_of_another_number_of_experts_is_named(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    stacked = {f"{MLP}.experts.down_proj": torch.zeros(5, 48, 20)}
    rewrite(tmp_path, lambda tensors: tensors.update(stacked))
    assert "experts.down_proj: expected [6, 48, 20], found [5, 48, 20]" in refused(tmp_path)


def test_another_number_of_experts_is_named(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight: expected \[5, 48\], found"):
        Qwen2MoeForCausalLM.from_pretrained(tmp_path, num_experts=5)
    with pytest.raises(CheckpointError, match=r"9 missing:\n.*mlp\.experts\.6\.gate_proj\.weight"):
        Qwen2MoeForCausalLM.from_pretrained(tmp_path, num_experts=7)


@torch.no_grad()
def test_a_language_model_becomes_a_classifier_and_back(tmp_path: Path) -> None:
    model = model_of(pad_token_id=0)
    model.save_pretrained(tmp_path / "lm")
    for cls in (Qwen2MoeForSequenceClassification, Qwen2MoeForQuestionAnswering):
        with pytest.warns(NewHeadWarning):
            other = cls.from_pretrained(tmp_path / "lm")
        states = other.base_model(IDS).last_hidden_state
        assert relative_error(states, model.model(IDS).last_hidden_state) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = Qwen2MoeModel.from_pretrained(tmp_path / "lm")
    bare.save_pretrained(tmp_path / "bare")
    assert f"{MLP.removeprefix('model.')}.experts.0.up_proj.weight" in tensors_of(tmp_path / "bare")
