"""A model that several processes hold computes what a whole one does."""

from typing import Any

import pytest

from conformance.families import FAMILIES, HEADS
from families import zamba2
from parallel.cases import tensor
from parallel.pool import Pool

Changes = dict[str, Any]
DEGREES = [{"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 4}, {"tp": 4, "ep": 2}, {"tp": 4, "ep": 4}]
# What of each family changes what is cut, or where sums are due.
VARIANTS: dict[str, list[Changes]] = {
    "qwen2": [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ],
    "qwen2-moe": [
        {"num_experts": 8},
        {"num_experts": 8, "num_experts_per_tok": 1},
        {"num_experts": 8, "mlp_only_layers": [0, 2], "qkv_bias": False},
        {"num_experts": 8, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ],
    "deepseek-v2": [
        {},
        {"q_lora_rank": None},
        {"attention_bias": True, "mlp_bias": True, "n_shared_experts": 2},
        {"n_shared_experts": None},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ],
    "deepseek-v3": [
        {},
        {"rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True},
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 1, "tie_word_embeddings": True, "q_lora_rank": None},
    ],
    "zamba2": [
        {},
        {"mamba_ngroups": 2, "mamba_d_conv": 3},
        zamba2.SHAPES["7b"],
        {"add_bias_linear": True, "num_key_value_heads": 2},
        {"tie_word_embeddings": False, "num_mem_blocks": 2},
        {"use_shared_attention_adapter": True, "num_key_value_heads": 1},
    ],
}
WITH_EXPERTS = ("qwen2-moe", "deepseek-v2", "deepseek-v3")
CELLS = [
    (name, degrees) for name in VARIANTS for degrees in DEGREES
    if "ep" not in degrees or name in WITH_EXPERTS
]  # fmt: skip
each_cell = pytest.mark.parametrize(("name", "degrees"), CELLS, ids=str)


def variants_for(name: str, degrees: dict[str, int], others: int = 0) -> list[Changes]:
    """Return all of them in two processes, and in four every second, others each time."""
    every = VARIANTS[name]
    first = degrees.get("ep", 2) // 4 + others
    return every[first % 2 :: 2] if degrees["tp"] == 4 else every


def pool_for(degrees: dict[str, int], two: Pool, four: Pool) -> Pool:
    return {2: two, 4: four}[degrees["tp"]]


@each_cell
def test_logits_and_gradients_are_those_of_the_whole(
    name: str, degrees: dict[str, int], two: Pool, four: Pool
) -> None:
    pool = pool_for(degrees, two, four)
    for changes in variants_for(name, degrees):
        pool.run(tensor.logits_and_gradients, name, changes, degrees)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_other_heads_say_what_the_whole_say(family: Any, two: Pool) -> None:
    degrees = {"tp": 2, "ep": 2} if family.name in WITH_EXPERTS else {"tp": 2}
    for head in HEADS:
        if head != "ForCausalLM":
            two.run(tensor.logits_and_gradients, family.name, {}, degrees, head)


@each_cell
def test_steps_go_on_as_the_whole_does(
    name: str, degrees: dict[str, int], two: Pool, four: Pool
) -> None:
    pool = pool_for(degrees, two, four)
    # By tp alone, what a step is tried with is not what a prompt was.
    for changes in variants_for(name, degrees, others="ep" not in degrees):
        pool.run(tensor.steps, name, changes, degrees)


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_in_one_row_are_apart(name: str, two: Pool) -> None:
    degrees = {"tp": 2, "ep": 2} if name in WITH_EXPERTS else {"tp": 2}
    for changes in VARIANTS[name]:
        two.run(tensor.packed_texts, name, changes, degrees)
