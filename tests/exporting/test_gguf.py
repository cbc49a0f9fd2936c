"""Models written as GGUF: read by the package of llama.cpp, and again by us, they are the same."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

import ggufwriting
from conformance.families import FAMILIES, Family
from quintet import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from quintet.conversion import convert
from quintet.errors import CheckpointError, InputError, SaveError, UnsupportedModelError
from quintet.exporting import GGUF_TYPES, export_gguf
from quintet.exporting.keys import config_metadata, read_otherwise
from quintet.gguf import read_gguf
from quintet.gguf.types import BY_NAME
from quintet.ops.block_encoding import encode_blocks
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.partings import PARTINGS

THERE = [family for family in FAMILIES if family.name != "zamba2"]
BY = {family.name: family for family in FAMILIES}
IDS = torch.arange(24).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def tokenizer_of(name: str = "qwen2") -> PreTrainedTokenizer:
    pipeline = Tokenizer(BPE())
    PARTINGS[name].apply(pipeline)
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pipeline.train_from_iterator(["the cat sat on the mat, the end"] * 3, trainer)
    special = ("<|end|>", "<|im_end|>")
    pipeline.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizer(
        tokenizer_object=pipeline, eos_token="<|end|>", chat_template="{{ messages }}"
    )


def saved(family: Family, root: Path, **changes: Any) -> Any:
    """Save a small model with a tokenizer, and return the model."""
    tokenizer = tokenizer_of("deepseek-v3" if "deepseek" in family.name else "qwen2")
    model: Any = family.model_of(vocab_size=320, **changes)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, len(tokenizer) - 1]
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return model


# Some cases are of models that llama.cpp reads otherwise, which a test of its own is about.
pytestmark = pytest.mark.filterwarnings("ignore:llama.cpp r:UserWarning")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
    ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("qwen2-moe", {"qkv_bias": False, "hidden_act": "swish"}),
    ("deepseek-v2", {"q_lora_rank": None}),
    ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ("deepseek-v3", {}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_tensor_and_key_is_what_llama_cpps_converter_writes(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(BY[name], tmp_path / "model", **changes)
    done = export_gguf(tmp_path / "model", tmp_path / "ours.gguf", dtype="F32")
    assert done.left_out == ()
    wanted = ggufwriting.write(model, tmp_path / "theirs.gguf")
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == wanted.keys()
    for key, (array, kind) in wanted.items():
        assert found[key].tensor_type == kind, key
        assert np.array_equal(found[key].data, array), key
    ours = read_gguf(tmp_path / "ours.gguf").metadata
    theirs = read_gguf(tmp_path / "theirs.gguf").metadata
    of_model = {key for key in theirs if not key.startswith(("general.", "GGUF."))}
    assert {key: ours[key] for key in of_model} == {key: theirs[key] for key in of_model}


@pytest.mark.parametrize("family", THERE, ids=lambda family: family.name)
def test_what_is_written_is_read_again(family: Family, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert torch.equal(logits(found), logits(model))
    wanted = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m.gguf")
    text = "the cat<|im_end|> sat 12"
    assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]
    assert tokenizer.chat_template == wanted.chat_template
    assert found.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_a_third_reader_finds_the_same_model(tmp_path: Path) -> None:
    from transformers import Qwen2ForCausalLM

    model = saved(BY["qwen2"], tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype="F32")
    found = Qwen2ForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert torch.allclose(logits(found), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_each_type_is_encoded_as_the_formats_package_does(kind: str) -> None:
    weight = torch.randn(40, 96)
    weight[0] = 0
    weight[1, :32] = torch.linspace(-1, 1, 32) * 1e-9
    weight[2] *= 1e4
    weight[3, ::2] = 0.5
    wanted = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    found = encode_blocks(weight, BY_NAME[kind])
    assert np.array_equal(found.numpy(), wanted.view(np.uint8).reshape(found.shape))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types_of_a_file(kind: str, tmp_path: Path) -> None:
    saved(BY["deepseek-v2"], tmp_path / "model", hidden_size=64, kv_lora_rank=32)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype=kind.lower())
    file = read_gguf(tmp_path / "m.gguf")
    kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert file.metadata["general.file_type"] == GGUF_TYPES[kind]
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.0.attn_kv_a_mqa.weight"] == kind
    assert kinds["output.weight"] == ("Q8_0" if kind == "Q4_0" else kind)
    # The rows of a head's keys are no multiple of a block.
    assert kinds["blk.0.attn_k_b.weight"] == ("F16" if kind.startswith("Q") else kind)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf"))).all()


def test_a_quantised_source_and_a_file_are_sources_too(tmp_path: Path) -> None:
    model = saved(BY["qwen2"], tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "int8", quantize="int8")
    export_gguf(tmp_path / "int8", tmp_path / "m.gguf", dtype="F32")
    wanted: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int8", quantize="none", dtype=torch.float32
    )
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert torch.equal(logits(found), logits(wanted))
    export_gguf(tmp_path / "m.gguf", tmp_path / "again.gguf", dtype="F32")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again.gguf")
    assert torch.equal(logits(again), logits(wanted))
    assert again.config.vocab_size == model.config.vocab_size


def test_prediction_layers_are_left_out_and_told(tmp_path: Path) -> None:
    saved(BY["deepseek-v3"], tmp_path / "model", num_nextn_predict_layers=1)
    done = export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert any("eh_proj" in name for name in done.left_out)


def test_a_model_without_a_tokenizer_makes_a_file_without_one(tmp_path: Path) -> None:
    BY["qwen2"].model_of().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="will have no tokenizer"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "no_vocab"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob=True cannot be said"),
        ("qwen2-moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] cannot be said"),
        ("qwen2-moe", {"tie_word_embeddings": True}, "tie_word_embeddings=True cannot be said"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu' cannot be said"),
        ("deepseek-v2", {"hidden_act": "relu"}, "hidden_act='relu' cannot be said"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave=False cannot be said"),
        (
            "qwen2",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' cannot be said",
        ),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    BY[name].model_of(**changes).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=said):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_family_without_an_architecture_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="no architecture for 'zamba2'"):
        config_metadata(AutoConfig.for_model("zamba2"))


def test_targets_and_types_are_checked_first(tmp_path: Path) -> None:
    saved(BY["qwen2"], tmp_path / "model")
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        export_gguf(tmp_path / "model", tmp_path / "out")
    with pytest.raises(InputError, match="there are F32, F16, Q4_0"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype="Q4_K")
    path = tmp_path / "m.gguf"
    export_gguf(tmp_path / "model", path)
    with pytest.raises(InputError, match="the source itself"):
        export_gguf(path, path)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    model: Any = saved(BY["qwen2"], tmp_path / "model")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"before")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = 1e30
    model.save_pretrained(tmp_path / "large")
    with (
        pytest.raises(CheckpointError, match=r"not finite in F16; take BF16 or F32"),
        pytest.warns(UserWarning, match="no tokenizer"),
    ):
        export_gguf(tmp_path / "large", path, dtype="F16")
    assert path.read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["large", "m.gguf", "model"]
    with pytest.raises(SaveError, match="could not write"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf" / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q_lora_rank": None}, "refuses one of 3"),
        ({"q_lora_rank": None, "num_hidden_layers": 27}, ""),
        (
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            "rates a group of experts by its best two",
        ),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 4}, ""),
        ({}, ""),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_told(changes: dict[str, Any], told: str) -> None:
    found = read_otherwise(BY["deepseek-v2"].model_of(**changes).config)
    assert told in " ".join(found)
    assert bool(found) == bool(told)
