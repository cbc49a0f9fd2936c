"""Checkpoints of Zamba2: shared blocks under any of their names, and new heads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comparisons import batch
from families.zamba2 import SHAPES, twins
from quintet.models.zamba2 import Zamba2ForCausalLM, Zamba2ForTokenClassification, Zamba2Model


@torch.no_grad()
@pytest.mark.parametrize("names", ["all", "last"])
def test_a_shared_block_is_found_under_any_of_its_names(names: str, tmp_path: Path) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", SHAPES["7b"])
    theirs.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    if names == "last":
        for first, again in ((0, 3), (2, 5)):
            for name in [name for name in state if f"layers.{first}.shared_transformer" in name]:
                assert name.replace(f"layers.{first}.", f"layers.{again}.") in state
                del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids, _, _ = batch("none")
    assert torch.equal(Zamba2ForCausalLM.from_pretrained(tmp_path)(ids).logits, ours(ids).logits)
    bare = Zamba2Model.from_pretrained(tmp_path)
    assert torch.equal(bare(ids).last_hidden_state, ours.model(ids).last_hidden_state)


def test_a_new_head_goes_on_a_released_model(tmp_path: Path) -> None:
    ours, _ = twins("Zamba2ForCausalLM", {})
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        model = Zamba2ForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 3)
