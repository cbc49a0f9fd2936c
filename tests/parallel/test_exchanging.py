"""Processes with texts of their own generate, and their tokens meet at the experts."""

from typing import Any

import pytest

from parallel.cases import exchanging
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
