"""The readers that are tried: each a right directory, the files that are changed, a function."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch

import packers
import quintet
from conformance.families import FAMILIES, Family
from fuzz.ggufs import GGUFS
from fuzz.mutants import mutant
from fuzz.running import Target
from fuzz.tokenizers import TOKENIZERS
from quintet import AutoModelForCausalLM, GenerationConfig
from quintet.checkpoint import Checkpoint

__all__ = ["TARGETS"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _small(family: Family, **save: Any) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        family.model_of().save_pretrained(root, **save)

    return make


def _quantised(quantize: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        plain = root.with_name(f"{root.name}.plain")
        FAMILIES[0].model_of().save_pretrained(plain)
        AutoModelForCausalLM.from_pretrained(plain, quantize=quantize).save_pretrained(root)

    return make


def _by_gptq(root: Path) -> None:
    def pack(path: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return packers.gptq(weight, group=32, symmetric=False, shuffled=True)

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    settings |= {"desc_act": True, "dynamic": {"-:.*lm_head": {}, r"a\.b": {"bits": 8}}}
    packers.packed_checkpoint(FAMILIES[0], root, pack, settings, num_hidden_layers=1)


def _by_awq(root: Path) -> None:
    def pack(path: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return packers.awq(weight, group=32)

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    packers.packed_checkpoint(FAMILIES[0], root, pack, settings, num_hidden_layers=1)


def _compressed(root: Path) -> None:
    """Integers in words, with all that may lie beside them; no package is needed to make them."""

    def pack(path: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        index = torch.arange(weight.shape[1]) // 32
        levels, scales, zeros = packers.rounded(weight, 4, index, False, torch.bfloat16)
        tensors = {"weight_packed": packers.words(levels, 4), "weight_scale": scales}
        tensors |= {"weight_zero_point": packers.words(zeros.T, 4).T.contiguous()}
        tensors |= {"weight_shape": torch.tensor(weight.shape), "weight_g_idx": index.int()}
        return tensors, packers.meant(levels, scales, zeros, index)

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights |= {"group_size": 32, "actorder": "group"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear", "re:.*x$"], "weights": weights}},
    }
    packers.packed_checkpoint(FAMILIES[0], root, pack, settings, num_hidden_layers=1)


def _generation(root: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "top_k": 5, "top_p": 0.9}
    options |= {"eos_token_id": [1, 2], "pad_token_id": 0, "repetition_penalty": 1.1}
    options |= {"bad_words_ids": [[3, 4]], "sequence_bias": [[[5], 1.0]], "num_beams": 2}
    options |= {"suppress_tokens": [7], "exponential_decay_length_penalty": [2, 1.1]}
    GenerationConfig(**options).save_pretrained(root)


def _header(content: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file as the JSON that it is, or the file as bytes."""
    if random.random() < 0.2:
        return mutant(content, random)
    length = int.from_bytes(content[:8], "little")
    header = mutant(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _read_weights(root: Path) -> None:
    checkpoint = Checkpoint.open(root)
    for _, tensor in checkpoint.read(checkpoint.tensors):
        tensor.view(-1)[:1].clone()


def _adapter(root: Path) -> None:
    plain = FAMILIES[1].model_of()
    config = {"target_modules": ["q_proj", "embed_tokens"], "bias": "all"}
    config |= {"target_parameters": ["experts.down_proj", "mlp.gate.weight"]}
    config |= {"modules_to_save": ["norm"], "trainable_token_indices": [5, 6]}
    config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.q_proj": 3}}
    plain.add_adapter({"peft_type": "LORA", "layers_to_transform": [0], **config})
    plain.save_pretrained(root)


def _put_on(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FAMILIES[1].model_of().load_adapter(root)


def _config_on_meta(root: Path) -> None:
    config = quintet.AutoConfig.from_pretrained(root)
    config.to_json_string()
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def _only(key: str) -> Callable[[bytes, Random], bytes]:
    """Change what a JSON object has under one key."""

    def change(content: bytes, random: Random) -> bytes:
        whole: Mapping[str, Any] = json.loads(content)
        changed = mutant(json.dumps(whole[key]).encode(), random)
        rest = json.dumps({k: v for k, v in whole.items() if k != key}).encode()
        return rest[:-1] + f', "{key}": '.encode() + changed + b"}"

    return change


TARGETS = (
    *TOKENIZERS,
    *GGUFS,
    *(
        Target(
            name=f"config-{family.name}",
            make=_small(family),
            files=("config.json",),
            read=AutoModelForCausalLM.from_pretrained,
        )
        for family in FAMILIES
    ),
    *(
        Target(
            name=f"config-on-meta-{family.name}",
            make=_small(family),
            files=("config.json",),
            read=_config_on_meta,
        )
        for family in FAMILIES
    ),
    *(
        Target(
            name=f"quantization-{kind}",
            make=_quantised(kind),
            files=("config.json",),
            read=AutoModelForCausalLM.from_pretrained,
            change=_only("quantization_config"),
        )
        for kind in ("int8", "int4", "nf4", "fp8")
    ),
    *(
        Target(
            name=f"{kind}-{what}",
            make=make,
            files=(file,),
            read=AutoModelForCausalLM.from_pretrained,
            change=change,
        )
        for kind, make in (("gptq", _by_gptq), ("awq", _by_awq), ("compressed", _compressed))
        for what, file, change in (
            ("config", "config.json", _only("quantization_config")),
            ("tensors", WEIGHTS, _header),
        )
    ),
    Target(
        name="generation-config",
        make=_generation,
        files=("generation_config.json",),
        read=GenerationConfig.from_pretrained,
    ),
    Target(
        name="weights",
        make=_small(FAMILIES[0]),
        files=(WEIGHTS,),
        read=_read_weights,
        change=_header,
    ),
    Target(
        name="model-weights",
        make=_small(FAMILIES[3]),
        files=(WEIGHTS,),
        read=AutoModelForCausalLM.from_pretrained,
        change=_header,
    ),
    Target(
        name="adapter-config",
        make=_adapter,
        files=("adapter_config.json",),
        read=_put_on,
    ),
    Target(
        name="adapter-weights",
        make=_adapter,
        files=("adapter_model.safetensors",),
        read=_put_on,
        change=_header,
    ),
    Target(
        name="index",
        make=_small(FAMILIES[0], max_shard_size="30KB"),
        files=(INDEX,),
        read=AutoModelForCausalLM.from_pretrained,
    ),
)
