"""Objects of Transformers, given where ours are expected."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quintet
from conformance.families import FAMILIES, Family, each, each_head
from conformance.heads import ids_of, made
from quintet.errors import ConfigError, InputError
from quintet.quantization import QuantizedLinear

IDS = torch.arange(10).view(2, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        family.model_of().save_pretrained(folder / family.name)
    return {family.name: folder / family.name for family in FAMILIES}


@each
def test_a_config_of_theirs_is_a_config(family: Family, saved: dict[str, Path]) -> None:
    cls, where = family.cls("ForCausalLM"), saved[family.name]
    theirs = transformers.AutoConfig.from_pretrained(where)
    plain = cls.from_pretrained(where)
    for build in (cls, quintet.AutoModelForCausalLM):
        model = build.from_pretrained(where, config=theirs)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        fresh = build.from_config(theirs)
        assert fresh.state_dict().keys() == plain.state_dict().keys()
        assert type(fresh.config) is type(plain.config)


def test_a_config_of_another_family_is_named() -> None:
    theirs = transformers.LlamaConfig()
    with pytest.raises(InputError, match=r"this is a transformers\.models\.llama.*LlamaConfig"):
        quintet.Qwen2ForCausalLM.from_config(theirs)
    with pytest.raises(InputError, match=r"Qwen2ForCausalLM\.from_config"):
        quintet.Qwen2ForCausalLM(transformers.Qwen2Config())
    with pytest.raises(InputError, match=r"this is a builtins\.int"):
        quintet.Qwen2ForCausalLM.from_config(3)


@each
def test_a_generation_config_of_theirs_stays(family: Family, saved: dict[str, Path]) -> None:
    cls = family.cls("ForCausalLM")
    theirs = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=100, pad_token_id=0)
    model = cls.from_pretrained(saved[family.name], generation_config=theirs)
    assert isinstance(model.generation_config, quintet.GenerationConfig)
    assert model.generate(IDS).shape == (2, 8)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2)
    assert model.generate(IDS).shape == (2, 7)
    assert model.generate(IDS, generation_config=theirs).shape == (2, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    ],
)
@each
def test_a_config_of_bitsandbytes_of_theirs(
    family: Family, options: dict[str, Any], saved: dict[str, Path]
) -> None:
    def loaded(module: Any) -> Any:
        config = module.BitsAndBytesConfig(**options)
        return family.cls("ForCausalLM").from_pretrained(
            saved[family.name], quantization_config=config
        )

    ours, theirs = loaded(quintet), loaded(transformers)
    assert any(isinstance(module, QuantizedLinear) for module in theirs.modules())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


class TorchAoConfig:
    """What an object of Transformers says; that itself needs torchao."""

    def to_dict(self) -> dict[str, Any]:
        kind = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
        quant_type = {"default": kind}
        return {
            "quant_method": "torchao",
            "quant_type": quant_type,
            "untie_embedding_weights": None,
        }


def test_a_config_of_torchao_of_theirs(saved: dict[str, Path]) -> None:
    cls, where = quintet.AutoModelForCausalLM, saved["qwen2"]
    model = cls.from_pretrained(where, quantization_config=TorchAoConfig())
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    with pytest.raises(ConfigError, match=r"builtins\.int.*of quintet or of Transformers"):
        cls.from_pretrained(where, quantization_config=8)


@each_head
def test_types_of_tokens_change_nothing(family: Family, head: str) -> None:
    model, ids = made(family, head), ids_of()
    mask = torch.ones_like(ids)
    types = torch.zeros_like(ids)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).to_tuple()[0]
        typed = model(ids, attention_mask=mask, token_type_ids=types).to_tuple()[0]
    assert torch.equal(plain, typed)


@each
def test_types_of_tokens_do_not_hinder_generating(family: Family) -> None:
    model = family.model_of()
    batch = {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}
    plain = model.generate(IDS, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), plain)
    assert torch.equal(model.generate(batch, max_new_tokens=3), plain)
