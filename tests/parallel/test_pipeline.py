"""Layers on several processes compute what they do on one."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel.cases import generate, pipeline
from parallel.cases.tensor import family
from parallel.pool import Pool
from parallel.test_generate import WAYS
from quintet.errors import InputError
from quintet.parallel.stages import LayerCost, split, stages_of

FAMILIES = ("qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_go_on_with_a_cache_as_one_process_does(name: str, padded: bool, two: Pool) -> None:
    two.run(pipeline.steps, name, {}, {"pp": 2}, padded)


def test_stages_of_cut_layers_go_on_as_one_process_does(four: Pool) -> None:
    four.run(pipeline.steps, "qwen2", {}, {"pp": 2, "tp": 2}, True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {"quantize": "int8"}),
        ("qwen2-moe", {}),
        ("deepseek-v2", {}),
        ("deepseek-v3", {}),
        ("zamba2", {}),
    ],
)
def test_stages_load_what_they_have_and_generate_as_one_process(
    name: str, options: dict[str, Any], two: Pool, tmp_path: Path
) -> None:
    changes = {"num_nextn_predict_layers": 1} if name == "deepseek-v3" else {}
    tied = {"tie_word_embeddings": True} if name == "qwen2-moe" else {}
    family(name).model_of(**changes, **tied).save_pretrained(tmp_path)
    two.run(pipeline.loaded_and_asked, name, tmp_path, options)


@pytest.mark.parametrize("way", ["beams", "guidance", "lookup", "caches"])
def test_stages_choose_in_every_way(way: str, two: Pool) -> None:
    two.run(generate.tokens, "qwen2", {"pp": 2}, WAYS[way][:2])


TURNS: list[dict[str, Any]] = [
    {"max_new_tokens": 64, "do_sample": False},
    {"max_new_tokens": 64, "do_sample": True},
    {"max_new_tokens": 6, "do_sample": True, "generator": None, "top_k": 5},
    {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "prefill_chunk_size": 2},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_rows_take_turns_and_get_what_one_process_gives_them(
    name: str, two: Pool
) -> None:
    two.run(pipeline.in_turns, name, {"pp": 2}, TURNS if name == "qwen2" else TURNS[1:2])


@pytest.mark.parametrize("degrees", [{"pp": 4}, {"pp": 2, "tp": 2}], ids=str)
def test_groups_take_turns_on_four(degrees: dict[str, int], four: Pool) -> None:
    four.run(pipeline.in_turns, "qwen2", degrees, TURNS[2:])


def test_groups_end_by_themselves(two: Pool) -> None:
    two.run(pipeline.ends_apart, "qwen2")


def test_a_group_that_fails_ends_all_and_leaves_nothing_behind(two: Pool) -> None:
    two.run(pipeline.fails_in_turns, "qwen2")


def test_stages_return_what_one_process_does(two: Pool) -> None:
    two.run(generate.outputs, "qwen2", {"pp": 2}, {"max_new_tokens": 6, "do_sample": False})


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_stages_are_those_of_one_process(name: str, two: Pool) -> None:
    changes = {"num_nextn_predict_layers": 1} if name == "deepseek-v3" else {}
    # The first process may have the last stage, too, as it has where tokens are chosen.
    for backwards in (False, True):
        two.run(pipeline.gradients, name, changes, {"pp": 2}, "1F1B", 1, backwards)


@pytest.mark.parametrize("name", ["qwen2", "deepseek-v3"])
def test_gradients_of_stages_of_cut_layers_are_those_of_one_process(name: str, four: Pool) -> None:
    four.run(pipeline.gradients, name, {}, {"pp": 2, "tp": 2}, "1F1B", 1)


@pytest.mark.parametrize(
    "schedule", ["GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
def test_every_schedule_comes_to_the_same_gradients(schedule: str, two: Pool) -> None:
    changes = {"num_hidden_layers": 5, "tie_word_embeddings": True}
    two.run(pipeline.gradients, "qwen2", changes, {"pp": 2}, schedule, 2)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    count=st.integers(1, 9),
    before=st.integers(0, 60),
    behind=st.integers(0, 60),
)
def test_no_split_has_a_smaller_largest_share(
    sizes: list[int], count: int, before: int, behind: int
) -> None:
    assume(count <= len(sizes))
    layers = [LayerCost(size, size) for size in sizes]
    runs = split(layers, count, LayerCost(before, 0), LayerCost(behind, behind))
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert all(runs)

    def largest(ends: tuple[int, ...]) -> float:
        edges = [0, *ends, len(sizes)]
        own = [sum(sizes[a:b]) for a, b in pairwise(edges)]
        own[-1] += behind
        products = max(own) / (sum(sizes) + behind)
        own[0] += before
        return max(max(own) / (sum(sizes) + before + behind), products)

    every = [largest(ends) for ends in combinations(range(1, len(sizes)), count - 1)]
    found = largest(tuple(run.start for run in runs[1:]))
    assert found <= min(every) * (1 + 1e-9)


def test_a_head_counts_where_layers_are_given_out() -> None:
    layer, head = LayerCost(100, 100), LayerCost(250, 250)
    assert split([layer] * 8, 2, LayerCost(0, 0), head) == [range(5), range(5, 8)]


def test_more_stages_than_layers_are_refused() -> None:
    model = family("qwen2").model_of(num_hidden_layers=2)
    with pytest.raises(InputError, match="pp=3 stages of 2 layers"):
        stages_of(model, 3)


def test_stages_of_a_classifier_are_refused() -> None:
    model = family("qwen2").model_of("ForSequenceClassification")
    with pytest.raises(InputError, match="score"):
        stages_of(model, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_on_the_stages_that_use_it(name: str) -> None:
    changes = {"num_nextn_predict_layers": 1} if name == "deepseek-v3" else {}
    model = family(name).model_of(**changes)
    stages = stages_of(model, 2)
    assert frozenset().union(*stages.names) == model.state_dict().keys()
    shared = stages.shared()
    if name == "deepseek-v3":
        # The prediction layer reads it, too, and has a name for it.
        assert set(shared) == {f"model.{path}embed_tokens.weight" for path in ("", "layers.3.")}
    elif name == "zamba2":
        assert "model.embed_tokens.weight" in shared
        assert any(".shared_transformer." in one for one in shared)
    else:
        assert not shared
