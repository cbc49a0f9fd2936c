"""Workers of ours and of Transformers, in turns on a tiny checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import turns
from benchmarks.suite import Case, Contender
from quintet.measurement import geometries
from quintet.measurement.geometries import Geometry

OURS, THEIRS = Contender("quintet", "bf16"), Contender("transformers", "bf16")
TINY = Geometry(
    "qwen2",
    {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> turns.Settings:
    monkeypatch.setattr(geometries, "GEOMETRIES", {"tiny": TINY})
    return turns.Settings(tmp_path, threads=1, repeats=2, rounds=2, in_time=lambda: True)


def case(kind: Any, tokens: int, *contenders: Contender, batch: int = 1) -> Case:
    return Case("tiny", kind, tokens, batch, contenders, steps=2)


def test_all_take_turns(settings: turns.Settings) -> None:
    all_of_them = (OURS, THEIRS, Contender("transformers", "int8"))
    cases = [case("decode", 9, *all_of_them, batch=2), case("prefill", 5, *all_of_them)]
    decoded, prompted = turns.run(cases, settings)
    for record in (decoded, prompted):
        *able, unable = record["results"].items()
        assert [name for name, _ in able] == ["quintet bf16", "transformers bf16"]
        for _, result in able:
            assert len(result["seconds"]) == 2
            assert all(0 < seconds < math.inf for seconds in result["seconds"])
            assert result["peak_memory"] > 10**7
            assert len(result["load_seconds"]) == 1
        name, result = unable
        assert (name, result["seconds"]) == ("transformers int8", [])
        assert "not in int8" in result["error"]
        assert record["bandwidth"]["bytes_per_second"] > 1e8
        # Who waits leaves the processor to the others.
        assert record["conditions"]["idle"] < 0.3
        assert record["conditions"]["turns"] == "every measurement"
    ours = decoded["results"]["quintet bf16"]
    assert ours["cache_bytes"] == 2 * 9 * 2 * 2 * (2 * 8) * 2
    for record in (decoded, prompted):
        assert record["gemm_flops_per_second"] > 1e6
        assert record["results"]["quintet bf16"]["flops"] > 0


def test_models_that_do_not_fit_are_held_one_at_a_time(
    settings: turns.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_free_memory", lambda: 0)
    (record,) = turns.run([case("decode", 9, OURS)], settings)
    assert record["conditions"]["turns"] == "2 rounds, one model held at a time"
    for result in record["results"].values():
        assert len(result["seconds"]) == 2
        assert len(result["load_seconds"]) == 2


def test_a_load_is_timed_to_its_first_token(settings: turns.Settings) -> None:
    (record,) = turns.run([case("load", 8, OURS)], settings)
    result = record["results"]["quintet bf16"]
    assert len(result["seconds"]) == len(result["load_seconds"]) == 2
    for whole, part in zip(result["seconds"], result["load_seconds"], strict=True):
        assert 0 < part < whole
