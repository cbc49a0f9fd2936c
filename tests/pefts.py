"""Adapters of PEFT on small models of ours and of Transformers, for the tests that compare them."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Family
from quintet.interop import as_transformers
from support import relative_error as relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

__all__ = [
    "ATTENTION",
    "IDS",
    "KINDS",
    "QUIET",
    "adapted",
    "logits",
    "lora",
    "peft",
    "relative",
    "twins",
]

# What PEFT says of tied weights, and Transformers to PEFT.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 5]])
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2-moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek-v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "deepseek-v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    # There each use of a shared block has an adapter of its own, here the block has one.
    "zamba2": ["in_proj", "out_proj"],
}
MLP = {
    "qwen2": ["gate_proj", "up_proj", "down_proj"],
    "qwen2-moe": ["shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate"],
    "deepseek-v2": [f"shared_experts.{part}_proj" for part in ("gate", "up", "down")],
    "deepseek-v3": [f"shared_experts.{part}_proj" for part in ("gate", "up", "down")],
    "zamba2": ["in_proj"],
}


def lora(targets: list[str] | str, **options: Any) -> Any:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, **options
    )


Kind = Callable[[str], Any]
KINDS: dict[str, Kind] = {
    "attention": lambda name: lora(ATTENTION[name]),
    "mlp": lambda name: lora(MLP[name]),
    "experts": lambda name: lora([], target_parameters=EXPERTS),
    "embeddings": lambda name: lora(["embed_tokens"]),
    "head": lambda name: lora(["lm_head"]),
    "dora": lambda name: lora(ATTENTION[name], use_dora=True),
    "some-tokens": lambda name: lora(ATTENTION[name], trainable_token_indices=[5, 6]),
    "saved-head": lambda name: lora(ATTENTION[name], modules_to_save=["lm_head"]),
    "ia3": lambda name: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=ATTENTION[name],
        feedforward_modules=[],
        init_ia3_weights=False,
    ),
}


def twins(family: Family, tied: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(3)
    ours, theirs = family.twins("ForCausalLM", {"tie_word_embeddings": tied}, "sdpa")
    return as_transformers(ours).eval(), theirs.eval()


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits
