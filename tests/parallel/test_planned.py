"""What is planned of a split, against what processes really hold of it."""

from typing import Any

import pytest

from parallel.cases import planned
from parallel.pool import Pool

CASES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2", {}, {"tp": 2}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"tp": 2}),
    ("qwen2-moe", {}, {"tp": 2}),
    ("qwen2-moe", {}, {"tp": 2, "ep": 2}),
    ("deepseek-v2", {}, {"tp": 2, "ep": 2}),
    ("deepseek-v3", {}, {"tp": 2, "ep": 2}),
    ("zamba2", {}, {"tp": 2}),
]


@pytest.mark.parametrize(("name", "changes", "degrees"), CASES, ids=str)
def test_a_shard_has_the_bytes_planned(
    name: str, changes: dict[str, Any], degrees: dict[str, int], two: Pool
) -> None:
    two.run(planned.bytes_of_a_shard, name, changes, degrees)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-moe", "zamba2"])
def test_a_slice_has_the_bytes_planned(name: str, two: Pool) -> None:
    two.run(planned.bytes_of_slices, name)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen2", {"tp_size": 2}),
        ("deepseek-v3", {"tp_size": 2, "ep_size": 2}),
        ("deepseek-v3", {"tp_size": 1, "ep_size": 2}),
        ("zamba2", {"tp_size": 2}),
    ],
)
def test_who_serves_has_the_bytes_that_are_said(
    name: str, sizes: dict[str, int], two: Pool
) -> None:
    two.run(planned.bytes_of_served, name, {}, sizes)
