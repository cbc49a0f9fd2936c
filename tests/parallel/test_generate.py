"""Several processes that hold a model make one text, that of a whole model."""

from typing import Any

import pytest

from conformance.families import WIDE
from parallel.cases import engine, generate
from parallel.pool import Pool
from quintet.kernels.native import available

TP2, EP2 = {"tp": 2}, {"tp": 2, "ep": 2}
# What of a family is kept or chosen in another way.
FAMILIES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("qwen2", {}, TP2),
    ("qwen2", {"tie_word_embeddings": True}, TP2),
    ("qwen2-moe", {}, EP2),
    ("deepseek-v2", {}, TP2),
    ("deepseek-v3", {}, EP2),
    ("zamba2", {}, TP2),
]
LONG = [{"max_new_tokens": 64, "do_sample": False}, {"max_new_tokens": 64, "do_sample": True}]


@pytest.mark.parametrize(("name", "changes", "degrees"), FAMILIES, ids=str)
def test_tokens_are_those_of_one_process(
    name: str, changes: dict[str, Any], degrees: dict[str, int], two: Pool
) -> None:
    two.run(generate.tokens, name, degrees, LONG, changes)


WAYS: dict[str, list[dict[str, Any]]] = {
    "sampling": [
        {"max_new_tokens": 12, "do_sample": True, **options}
        for options in (
            {"top_k": 5, "temperature": 0.7},
            {"top_p": 0.8, "top_k": None},
            {"min_p": 0.05, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
            {"num_return_sequences": 2},
        )
    ],
    "beams": [
        {"max_new_tokens": 10, "num_beams": 3, **options}
        for options in (
            {},
            {"do_sample": True, "num_return_sequences": 2, "early_stopping": True},
            {"no_repeat_ngram_size": 2, "length_penalty": 2.0},
        )
    ],
    "guidance": [
        {"max_new_tokens": 8, "guidance_scale": 1.5, "do_sample": True},
        {"max_new_tokens": 8, "guidance_scale": 1.5, "num_beams": 2},
    ],
    "lookup": [
        {"max_new_tokens": 24, "prompt_lookup_num_tokens": 3, **options}
        for options in ({}, {"do_sample": True}, {"no_repeat_ngram_size": 3})
    ],
    "caches": [
        {"max_new_tokens": 8, **options}
        for options in (
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "offloaded"},
            {"prefill_chunk_size": 3},
        )
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_is_that_of_one_process(way: str, two: Pool) -> None:
    two.run(generate.tokens, "qwen2", TP2, WAYS[way])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "num_beams": 2},
        {"max_new_tokens": 9, "prompt_lookup_num_tokens": 2},
    ],
    ids=["greedy", "beams", "lookup"],
)
def test_scores_and_logits_are_returned_in_all(options: dict[str, Any], two: Pool) -> None:
    two.run(generate.outputs, "qwen2", TP2, options)


def test_what_reads_and_ends_a_text_is_asked_in_one(two: Pool) -> None:
    two.run(generate.read_in_one, "qwen2", TP2)


def test_those_who_are_asked_differently_all_say_so(two: Pool) -> None:
    two.run(generate.disagreement, "qwen2", TP2)


def test_what_fails_in_the_one_that_chooses_ends_all(two: Pool) -> None:
    two.run(generate.failures, "qwen2", TP2)


def test_rows_with_options_of_their_own(two: Pool) -> None:
    two.run(generate.own_options, "qwen2", TP2)


@pytest.mark.skipif(not available(), reason="kernels run layers in one call")
@pytest.mark.parametrize("name", ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3"])
def test_a_step_is_one_call_that_meets_the_others_twice_a_layer(name: str, two: Pool) -> None:
    two.run(generate.one_call, name, TP2, WIDE[name])


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v2", "zamba2"])
def test_every_cache_holds_what_is_of_this_process(name: str, two: Pool) -> None:
    caches: list[dict[str, Any]] = [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
    ]
    two.run(generate.tokens, name, TP2, [{"max_new_tokens": 5, **options} for options in caches])


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("qwen2", 0.5, 0.5), ("deepseek-v3", 1.0, 1.0), ("zamba2", 0.5, 0.6)],
)
def test_heads_are_kept_once_and_latents_by_all(
    name: str, least: float, most: float, two: Pool
) -> None:
    for share in two.run(generate.kept, name, TP2):
        assert least <= share <= most


def test_a_cache_is_gone_on_with(two: Pool) -> None:
    two.run(generate.gone_on_with, "qwen2", TP2)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_prediction_layers_draft_the_same_in_all(options: dict[str, Any], two: Pool) -> None:
    drafts = [{"max_new_tokens": 16, "use_mtp": True, "num_assistant_tokens": 2, **options}]
    two.run(generate.tokens, "deepseek-v3", TP2, drafts, {"num_nextn_predict_layers": 1})


def test_an_assistant_drafts_the_same_in_all(two: Pool) -> None:
    two.run(generate.assisted, "qwen2", TP2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {}),
        ("qwen2", {"do_sample": True}),
        ("qwen2", {"prompt_lookup_num_tokens": 3}),
        ("deepseek-v2", {}),
        ("deepseek-v3", {"use_mtp": True, "num_assistant_tokens": 2, "do_sample": True}),
        ("zamba2", {}),
    ],
    ids=str,
)
def test_an_engine_makes_what_it_makes_in_one_process(
    name: str, options: dict[str, Any], two: Pool
) -> None:
    two.run(engine.steps, name, TP2, options)


def test_what_is_served_is_that_of_one_process(two: Pool) -> None:
    two.run(engine.served, "qwen2", TP2, {"max_new_tokens": 9})


def test_an_interrupt_ends_all_at_the_same_step(two: Pool) -> None:
    two.run(generate.interrupted, "qwen2", TP2)


@pytest.mark.parametrize(
    ("name", "changes", "degrees"),
    [
        ("qwen2", {"num_key_value_heads": 4, "num_hidden_layers": 2}, {"tp": 4}),
        ("qwen2-moe", {"num_experts": 8}, {"tp": 4, "ep": 4}),
        ("deepseek-v3", {}, {"tp": 4, "ep": 4}),
        ("zamba2", {}, {"tp": 4}),
    ],
    ids=str,
)
def test_four_make_the_same(
    name: str, changes: dict[str, Any], degrees: dict[str, int], four: Pool
) -> None:
    four.run(generate.tokens, name, degrees, LONG, changes)
