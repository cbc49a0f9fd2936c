"""Sequences on several processes are learned from as on one."""

from typing import Any

import pytest

from parallel.cases import sequence
from parallel.pool import Pool

PREDICTS = {"num_nextn_predict_layers": 2}


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("qwen2", {}, "packed"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, ""),
        ("qwen2-moe", {}, "padded"),
        ("deepseek-v2", {}, ""),
        ("deepseek-v3", PREDICTS, ""),
        ("deepseek-v3", PREDICTS, "packed"),
        ("zamba2", {}, ""),
        ("zamba2", {}, "padded"),
    ],
)
def test_gradients_of_shared_rows_are_those_of_one_process(
    name: str, changes: dict[str, Any], kind: str, two: Pool
) -> None:
    # 15 tokens are no multiple of the chunks.
    two.run(sequence.gradients, name, changes, kind, 15, 2)


@pytest.mark.parametrize("name", ["deepseek-v3", "zamba2"])
def test_four_processes_share_rows(name: str, four: Pool) -> None:
    four.run(sequence.gradients, name, {}, "", 33, 4)


@pytest.mark.parametrize(
    ("name", "changes", "padded"),
    [
        ("qwen2", {}, True),
        ("qwen2-moe", {}, False),
        ("deepseek-v2", {}, True),
        ("deepseek-v3", {"num_nextn_predict_layers": 1}, False),
        ("zamba2", {}, False),
    ],
)
def test_norms_of_slices_learn_what_whole_ones_do(
    name: str, changes: dict[str, Any], padded: bool, two: Pool
) -> None:
    two.run(sequence.slices, name, changes, padded)


@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
def test_what_enters_and_leaves_in_slices_is_the_whole(by_messages: bool, two: Pool) -> None:
    two.run(sequence.regions, by_messages)


@pytest.mark.parametrize("name", ["qwen2", "zamba2"])
def test_slices_of_tokens_keep_less_as_planned(name: str, two: Pool) -> None:
    for (whole, planned), (sliced, planned_sliced) in two.run(sequence.kept, name):
        assert sliced < 0.97 * whole
        assert planned - planned_sliced == pytest.approx(whole - sliced, rel=0.05)
