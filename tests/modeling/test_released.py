"""State dicts with the names of files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conformance.families import FAMILIES, Family, each, each_head

IDS = torch.arange(6)[None]


@each_head
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_in_a_file_is_loaded(
    family: Family, head: str, wrapped: bool, tmp_path: Path
) -> None:
    saved, other = (family.model_of(head, tie_word_embeddings=True) for _ in range(2))
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = set(state)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    into = nn.Sequential(other) if wrapped else other
    given = {f"0.{name}": tensor for name, tensor in state.items()} if wrapped else state
    found = into.load_state_dict(given, strict=False)
    assert not found.unexpected_keys
    start = "0." if wrapped else ""
    assert set(found.missing_keys) == {start + n for n in other._keys_to_ignore_on_save or ()}
    assert torch.equal(other(IDS).to_tuple()[0], saved(IDS).to_tuple()[0])
    assert set(state) == names


@each
def test_its_own_state_is_loaded_strictly(family: Family) -> None:
    saved, other = family.model_of(), family.model_of(initializer_range=0.5)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(IDS).logits, saved(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES[1:4], ids=str)
@pytest.mark.parametrize("change", ["missing", "reshaped"])
def test_experts_that_are_not_whole_are_told(family: Family, change: str, tmp_path: Path) -> None:
    model = family.model_of()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("experts.1.up_proj.weight"))
    if change == "missing":
        del state[name]
    else:
        state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj(.|\n)*Unexpected key"):
        model.load_state_dict(state)
