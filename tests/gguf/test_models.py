"""Models that were written as GGUF are the models that were written."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import ggufwriting
import quintet
from conformance.families import FAMILIES
from quintet import AutoConfig, AutoModel, AutoModelForCausalLM
from quintet.errors import InputError, ModelNotFoundError

THERE = [family for family in FAMILIES if family.name != "zamba2"]
IDS = torch.arange(24).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def same(one: Any, other: Any) -> bool:
    return torch.equal(logits(one), logits(other))


@pytest.fixture(scope="module")
def model() -> Any:
    return THERE[0].model_of()


@pytest.fixture(scope="module")
def written(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.gguf"
    ggufwriting.write(model, path)
    return path


VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {}, {}),
    ("qwen2", {"tie_word_embeddings": True}, {}),
    ("qwen2", {"head_dim": 8}, {"alignment": 64}),
    ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    (
        "qwen2",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {},
    ),
    ("qwen2", {}, {"shard_tensors": 9}),
    ("qwen2-moe", {}, {}),
    ("qwen2-moe", {}, {"shard_tensors": 16}),
    ("deepseek-v2", {}, {}),
    ("deepseek-v2", {}, {"old_kv": True}),
    ("deepseek-v2", {"q_lora_rank": None}, {"alignment": 64}),
    (
        "deepseek-v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {},
    ),
    (
        "deepseek-v2",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            }
        },
        {},
    ),
    ("deepseek-v3", {}, {}),
    ("deepseek-v3", {}, {"old_kv": True, "shard_tensors": 12}),
    ("deepseek-v3", {"num_nextn_predict_layers": 1}, {}),
    ("deepseek-v3", {"q_lora_rank": None, "norm_topk_prob": True}, {}),
]


@pytest.mark.parametrize(
    ("name", "changes", "how"), VARIANTS, ids=lambda value: str(value).replace(" ", "")
)
def test_the_logits_are_those_of_the_source(
    name: str, changes: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    (family,) = (one for one in THERE if one.name == name)
    source = family.model_of(**changes)
    ggufwriting.write(source, tmp_path / "model.gguf", **how)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1 or "shard_tensors" not in how

    # Of several files, any stands for all.
    found = AutoModelForCausalLM.from_pretrained(files[-1])

    assert type(found) is type(source)
    assert found.dtype == torch.float32
    assert same(found, source)
    expected = source.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name_of, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name_of]), name_of
    assert "quantization_config" not in vars(found.config)
    text = found.generate(IDS, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert torch.equal(text, source.generate(IDS, max_new_tokens=8, do_sample=False))


def test_a_llama_is_a_qwen2_without_biases(model: Any, tmp_path: Path) -> None:
    source = THERE[0].model_of()
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if name.endswith("_proj.bias"):
                weight.zero_()
    ggufwriting.write(source, tmp_path / "m.gguf", architecture=gguf.MODEL_ARCH.LLAMA)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf"), source)


def test_every_way_in_leads_to_the_model(model: Any, written: Path) -> None:
    folder = written.parent
    for found in (
        AutoModelForCausalLM.from_pretrained(written),
        AutoModelForCausalLM.from_pretrained(str(written)),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=written.name),
        quintet.Qwen2ForCausalLM.from_pretrained(written),
        quintet.Qwen2ForCausalLM.from_pretrained(folder, gguf_file=written.name),
    ):
        assert same(found, model)
    base = AutoModel.from_pretrained(written)
    assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    config = AutoConfig.from_pretrained(folder, gguf_file=written.name)
    assert AutoConfig.from_pretrained(written) == config
    assert quintet.Qwen2Config.from_pretrained(written) == config
    assert config.num_hidden_layers == model.config.num_hidden_layers


def test_a_file_without_its_name_is_known_by_its_first_bytes(written: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(written.read_bytes())
    assert AutoConfig.from_pretrained(blob).model_type == "qwen2"


def test_of_several_files_one_has_to_be_named(model: Any, written: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf", "mmproj-one.gguf"):
        (tmp_path / name).write_bytes(written.read_bytes())
    with pytest.raises(InputError, match=r"(?s)2 models in GGUF.*\n  one.gguf\n  two.gguf"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="two.gguf"), model)
    with pytest.raises(ModelNotFoundError, match=r"no 'three\.gguf'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="three.gguf")
    with pytest.raises(ModelNotFoundError, match=r"has no '\.\./one"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="../one.gguf")
    with pytest.raises(InputError, match="a file already"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one.gguf", gguf_file="two.gguf")


def test_safetensors_come_before_what_lies_beside_them(
    model: Any, written: Path, tmp_path: Path
) -> None:
    other = THERE[0].model_of(num_hidden_layers=1)
    other.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").write_bytes(written.read_bytes())
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), other)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"), model)


def test_maps_that_lie_on_top_of_each_other_are_taken_apart(model: Any, tmp_path: Path) -> None:
    fused = THERE[0].model_of()

    def stacked(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in range(fused.config.num_hidden_layers):
            for leaf in ("weight", "bias"):
                parts = [found.pop(f"blk.{layer}.attn_{which}.{leaf}") for which in "qkv"]
                found[f"blk.{layer}.attn_qkv.{leaf}"] = torch.cat(parts)
        return found

    ggufwriting.write(fused, tmp_path / "m.gguf", change=stacked)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf"), model)


def test_gates_that_lie_on_top_of_each_other_are_taken_apart(tmp_path: Path) -> None:
    (family,) = (one for one in THERE if one.name == "qwen2-moe")
    source = family.model_of()

    def stacked(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in found if "ffn_gate_exps" in name]:
            parts = [found.pop(name), found.pop(name.replace("gate", "up"))]
            found[name.replace("ffn_gate_exps", "ffn_gate_up_exps")] = torch.cat(parts, dim=1)
        return found

    ggufwriting.write(source, tmp_path / "m.gguf", change=stacked)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf"), source)
