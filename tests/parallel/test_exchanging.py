"""Processes with texts of their own generate, and their tokens meet at the experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.cases import exchanging
from parallel.cases.tensor import family
from parallel.launching import launch
from parallel.pool import Pool

DATA2 = {"fsdp": 2, "ep": 2}
WAYS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"do_sample": False}, {"prefill_chunk_size": 2}],
    "sampled": [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}],
    "beams": [{"num_beams": 3}, {"num_beams": 2, "do_sample": True, "max_new_tokens": 6}],
    "lookup": [{"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 2, "do_sample": True}],
    "guided": [{"guidance_scale": 1.5, "max_new_tokens": 6}],
    "caches": [{"use_cache": False}, {"cache_implementation": "static"}],
}


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v2", "deepseek-v3"])
def test_each_process_makes_of_its_own_texts_what_one_makes(name: str, two: Pool) -> None:
    two.run(exchanging.texts, name, DATA2, [*WAYS["greedy"], *WAYS["sampled"]], {})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_goes(way: str, two: Pool) -> None:
    two.run(exchanging.texts, "qwen2-moe", DATA2, WAYS[way], {})


def test_prediction_layers_draft(two: Pool) -> None:
    drafts = {"use_mtp": True, "num_assistant_tokens": 2}
    each = [drafts, {**drafts, "do_sample": True}]
    two.run(exchanging.texts, "deepseek-v3", DATA2, each, {"num_nextn_predict_layers": 1})


def test_who_is_elsewhere_answers_and_goes_on(two: Pool) -> None:
    """One drafts with blocks of experts that the other never comes to."""
    two.run(exchanging.apart, "deepseek-v3", DATA2, {"num_nextn_predict_layers": 1})


@pytest.mark.parametrize("victim", [0, 1])
def test_what_fails_in_one_ends_all_who_go_on_then(victim: int, two: Pool) -> None:
    two.run(exchanging.one_fails, "qwen2-moe", DATA2, victim)


def test_what_fails_in_an_expert_is_raised_there(two: Pool) -> None:
    two.run(exchanging.an_expert_fails, "qwen2-moe", DATA2)


def test_an_interrupt_of_one_ends_all(two: Pool) -> None:
    two.run(exchanging.one_is_interrupted, "deepseek-v2", DATA2)


def test_who_has_no_text_answers_for_its_experts(two: Pool) -> None:
    two.run(exchanging.some_have_nothing, "deepseek-v3", DATA2)


def test_what_cannot_be_is_refused_in_all(two: Pool) -> None:
    two.run(exchanging.refusals, "qwen2-moe", DATA2)


def test_who_learns_does_not_part(two: Pool) -> None:
    for said in two.run(exchanging.learning_apart, "qwen2-moe", DATA2):
        assert "all have to run the same forwards" in said


@pytest.mark.parametrize(
    ("name", "changes", "degrees"),
    [
        ("qwen2-moe", {"num_experts": 8}, {"tp": 2, "fsdp": 2, "ep": 4}),
        ("deepseek-v2", {}, {"fsdp": 4, "ep": 4}),
        ("deepseek-v3", {"num_nextn_predict_layers": 1}, {"tp": 2, "fsdp": 2, "ep": 4}),
    ],
    ids=str,
)
def test_four_make_the_same(
    name: str, changes: dict[str, Any], degrees: dict[str, int], four: Pool
) -> None:
    drafts = {"use_mtp": True} if name == "deepseek-v3" else {"prompt_lookup_num_tokens": 2}
    each = [{"do_sample": True}, drafts, {"num_beams": 2, "max_new_tokens": 5}]
    four.run(exchanging.texts, name, degrees, each, changes)


GROUPS = {"tp": 2, "fsdp": 2, "ep": 4}


def test_what_fails_in_a_group_ends_all(four: Pool) -> None:
    four.run(exchanging.one_fails, "deepseek-v3", GROUPS, 1)


def test_an_interrupt_of_a_group_ends_all(four: Pool) -> None:
    four.run(exchanging.one_is_interrupted, "deepseek-v3", GROUPS)


def test_a_script_loads_generates_and_saves(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    whole = family("qwen2-moe").model_of().eval()
    whole.save_pretrained(source)
    ended = launch(2, exchanging.script, source, target, False, where=tmp_path)
    for number, one in enumerate(ended):
        assert (one.code, one.err) == (0, ""), one.err
        assert json.loads(one.out) == exchanging.made(whole, number, {"do_sample": True})
    found, expected = (load_file(folder / "model.safetensors") for folder in (target, source))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_error_between_texts_ends_all_with_one_message(tmp_path: Path) -> None:
    source = tmp_path / "source"
    family("qwen2-moe").model_of().save_pretrained(source)
    ended = launch(2, exchanging.script, source, tmp_path / "target", True, where=tmp_path)
    assert [one.code for one in ended] == [1, 1]
    lines = [line for one in ended for line in one.err.splitlines() if line.startswith("error: ")]
    (line,) = lines
    assert "rank 1 (process " in line
    assert "failed: ValueError: no such number" in line


def test_the_block_that_is_farthest_goes_first(two: Pool) -> None:
    """So whoever is in the middle of a forward ends it, and all begin the next one together."""
    assert two.run(exchanging.turns) == [[2, 3, 1], [2, 3, 1]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2-moe", {}),
        ("deepseek-v2", {"prompt_lookup_num_tokens": 3}),
        ("deepseek-v3", {"use_mtp": True, "num_assistant_tokens": 2}),
    ],
    ids=str,
)
def test_engines_answer_what_each_is_asked(name: str, options: dict[str, Any], two: Pool) -> None:
    changes = {"num_nextn_predict_layers": 1} if "use_mtp" in options else {}
    two.run(exchanging.served, name, DATA2, options, changes)


def test_engines_of_groups_lead_their_own(four: Pool) -> None:
    four.run(exchanging.served, "deepseek-v3", GROUPS, {}, {})


def test_an_engine_that_fails_for_good_ends_all(two: Pool) -> None:
    two.run(exchanging.engine_fails, "qwen2-moe", DATA2)
