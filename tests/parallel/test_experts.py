"""Experts on several processes: tokens are sent to them, and hot ones stand at several places."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.cases import experts
from parallel.cases.tensor import family
from parallel.launching import launch
from parallel.pool import Pool

SENT: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2-moe", {}, {"fsdp": 2, "ep": 2}),
    ("qwen2-moe", {"num_experts_per_tok": 1, "hidden_act": "gelu"}, {"fsdp": 2, "ep": 2}),
    ("deepseek-v2", {}, {"fsdp": 2, "ep": 2}),
    ("deepseek-v3", {}, {"fsdp": 2, "ep": 2}),
    ("deepseek-v3", {}, {"tp": 2, "fsdp": 2, "ep": 4}),
    ("qwen2-moe", {"num_experts": 8}, {"tp": 2, "fsdp": 2, "ep": 4}),
    ("deepseek-v2", {"num_experts_per_tok": 1}, {"fsdp": 4, "ep": 4}),
]


@pytest.mark.parametrize(("name", "changes", "degrees"), SENT, ids=str)
def test_tokens_are_sent_to_experts_and_all_learn(
    name: str, changes: dict[str, Any], degrees: dict[str, int], two: Pool, four: Pool
) -> None:
    pool = two if degrees["ep"] == 2 else four
    pool.run(experts.own_tokens, name, changes, degrees)


@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 2}, {"fsdp": 2, "ep": 2}], ids=str)
@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3"])
def test_experts_that_stand_at_several_places_say_the_same(
    name: str, degrees: dict[str, int], two: Pool
) -> None:
    two.run(experts.redundant, name, {}, degrees, 2)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_experts_are_loaded_to_their_seats(quantize: str | None, tmp_path: Path, two: Pool) -> None:
    family("qwen2-moe").model_of().save_pretrained(tmp_path)
    two.run(experts.loaded, "qwen2-moe", {}, tmp_path, quantize)


def test_seats_are_asked_for_by_the_configuration(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    family("qwen2-moe").model_of().save_pretrained(source)
    for ended in launch(2, experts.asked_for, source, target, where=tmp_path):
        assert (ended.code, ended.out) == (0, "the same\n"), ended.err
    found, expected = (load_file(folder / "model.safetensors") for folder in (target, source))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
# Two a layer of a transformer; one a mixer, and two more where a shared block is in front of it.
# And one for the embedding.
COUNTS: list[tuple[str, dict[str, Any], dict[str, int], int]] = [
    ("qwen2", {}, {"tp": 2}, 1 + 2 * 3),
    ("qwen2-moe", {}, {"tp": 2}, 1 + 2 * 3),
    ("qwen2-moe", {}, {"tp": 2, "ep": 2}, 1 + 2 * 3),
    ("deepseek-v2", {}, {"tp": 2}, 1 + 2 * 3),
    ("deepseek-v3", {}, {"tp": 2, "ep": 2}, 1 + 2 * 3),
    ("zamba2", {**HYBRID, "mamba_ngroups": 2}, {"tp": 2}, 1 + 2 * 1 + 2 * 3),
    # A group that two processes share has one more, of one number a token.
    ("zamba2", HYBRID, {"tp": 2}, 1 + 2 * 1 + 2 * 3 + 4),
]


@pytest.mark.parametrize(("name", "changes", "degrees", "count"), COUNTS)
def test_a_layer_sums_as_often_as_it_has_to(
    name: str, changes: dict[str, Any], degrees: dict[str, int], count: int, two: Pool
) -> None:
    assert two.run(experts.reductions, name, changes, degrees) == [count, count]
