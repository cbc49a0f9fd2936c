"""Checkpoints with and without prediction layers, and the router's bias in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from comparisons import batch
from families.deepseek import MODULES, model_of, twins
from quintet.errors import CheckpointError
from quintet.modeling.mtp import MissingPredictionLayersWarning
from support import relative_error

TOLERANCE = 1e-5


def class_of(family: str, head: str = "ForCausalLM") -> Any:
    return getattr(MODULES[family], family + head)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_prediction_layers_are_saved_and_loaded_under_their_names(
    tied: bool, tmp_path: Path
) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.experts.0.up_proj"):
        assert f"model.layers.4.{name}.weight" in names
    again = class_of("DeepseekV3").from_pretrained(tmp_path)
    ids, _, _ = batch("none")
    made, told = (m(ids, output_mtp_logits=True) for m in (again, model))
    assert torch.equal(made.logits, told.logits)
    assert all(map(torch.equal, made.mtp_logits, told.mtp_logits))
    assert again.model.layers[3].embed_tokens.weight is again.model.embed_tokens.weight
    # Transformers reads it too: without these layers, and as their layers.
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert relative_error(theirs(ids).logits, told.logits) < TOLERANCE


@torch.no_grad()
def test_released_files_repeat_embedding_and_head_in_the_prediction_layer(tmp_path: Path) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = class_of("DeepseekV3").from_pretrained(tmp_path)
    ids, _, _ = batch("none")
    assert torch.equal(
        again(ids, output_mtp_logits=True).mtp_logits[0],
        model(ids, output_mtp_logits=True).mtp_logits[0],
    )


@torch.no_grad()
def test_a_checkpoint_without_prediction_layers_loads_without_them(tmp_path: Path) -> None:
    # Transformers counts one layer in every config, and saves none.
    _, theirs = twins("DeepseekV3", "ForCausalLM", {})
    theirs.config.num_nextn_predict_layers = 1
    theirs.save_pretrained(tmp_path)
    with pytest.warns(MissingPredictionLayersWarning, match=r"model\.layers\.3\."):
        ours = class_of("DeepseekV3").from_pretrained(tmp_path)
    assert ours.config.num_nextn_predict_layers == 0
    assert len(ours.model.layers) == 3
    ids, mask, _ = batch("none")
    told = theirs(ids, attention_mask=mask).logits
    assert relative_error(ours(ids).logits, told) < TOLERANCE
    # Not asked for, not missed.
    plain = class_of("DeepseekV3").from_pretrained(tmp_path, num_mtp_layers=0)
    assert torch.equal(plain(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_a_class_that_predicts_no_tokens_leaves_the_layers_that_do(tmp_path: Path) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    base = class_of("DeepseekV3", "Model").from_pretrained(tmp_path)
    assert len(base.layers) == model.config.num_hidden_layers
    ids, _, _ = batch("none")
    told = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(ids).last_hidden_state, told)


def test_a_prediction_layer_with_a_hole_is_refused(tmp_path: Path) -> None:
    model_of("DeepseekV3", num_nextn_predict_layers=2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        class_of("DeepseekV3").from_pretrained(tmp_path)


@torch.no_grad()
def test_the_routers_bias_is_kept_in_float32_in_files_and_models(tmp_path: Path) -> None:
    model = model_of("DeepseekV3").bfloat16()
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[name].dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = class_of("DeepseekV3").from_pretrained(tmp_path, dtype=torch.float16)
    assert again.state_dict()[name].dtype == torch.float32
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    # A file that rounded it already gives the rounded numbers, in float32 again.
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = class_of("DeepseekV3").from_pretrained(tmp_path)
    assert again.state_dict()[name].dtype == torch.float32
