"""`quintet bench`: rows for what was asked, as a table and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from quintet.auto import AutoConfig
from quintet.cli import bench
from quintet.generation.cache_choice import CACHE_BITS
from quintet.measurement.floors import prompt_flops

QUICK = ("-r", "2", "-n", "2")


def test_every_combination_is_a_row(quintet: Any, chat_model: Path) -> None:
    result = quintet(
        "bench", chat_model, "--json", "-p", "4,8", "-d", "3,9", "-b", "1,2", "-t", "1", *QUICK
    )
    assert result.code == 0
    found = json.loads(result.out)
    assert [(row["test"], row["batch"]) for row in found["rows"]] == [
        (test, batch) for batch in (1, 2) for test in ("pp4", "pp8", "tg2 @ d3", "tg2 @ d9")
    ]
    for row in found["rows"]:
        tokens = row["batch"] * (int(row["test"][2:]) if row["test"].startswith("pp") else 1)
        assert len(row["each"]) == 2
        assert 0 < row["least"] <= row["seconds"] <= row["most"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        assert row["of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert (found["family"], found["dtype"], found["threads"]) == ("qwen2", "float32", 1)
    assert found["load_seconds"] > 0
    assert found["peak_memory_bytes"] > 10_000_000
    assert found["bandwidth"]["bytes_per_second"] > 1e8


def test_the_table(quintet: Any, chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "demo_model", lambda: chat_model)
    result = quintet("bench", "-p", "4", "-d", "3", "-t", "1", "-q", *QUICK)
    assert (result.code, result.err) == (0, "")
    header, rule, prompt, steps, gap, model, memory, *_ = result.out.splitlines()
    assert header.split("|")[1:3] == [" test     ", " batch "]
    assert set(rule) == {"|", "-", " "}
    assert len({len(header), len(rule), len(prompt), len(steps)}) == 1
    assert prompt.startswith("| pp4 ")
    assert steps.startswith("| tg2 @ d3 ")
    assert gap == ""
    assert model.startswith("qwen2, 0 M parameters, float32 on cpu, 1 threads")
    assert memory.startswith("peak memory ")


def test_only_prompts_or_only_steps(quintet: Any, chat_model: Path) -> None:
    prompts = json.loads(quintet("bench", chat_model, "--json", "-p", "4", "-n", "0").out)
    steps = json.loads(quintet("bench", chat_model, "--json", "-p", "0", "-d", "2", *QUICK).out)
    assert [row["test"] for row in prompts["rows"]] == ["pp4"]
    assert [row["test"] for row in steps["rows"]] == ["tg2 @ d2"]
    assert steps["gemm_flops_per_second"] is None


def test_many_rows_cannot_be_faster_than_their_products(quintet: Any, chat_model: Path) -> None:
    found = json.loads(
        quintet("bench", chat_model, "--json", "-p", "0", "-d", "2", "-b", "64", *QUICK).out
    )
    flops = prompt_flops(AutoConfig.from_pretrained(chat_model), 64, 1)
    assert found["rows"][0]["floor_seconds"] >= flops / found["gemm_flops_per_second"] > 0


def test_quantised_weights_are_fewer_bytes(quintet: Any, chat_model: Path) -> None:
    found = []
    for options in ([], ["--quantize", "int8"]):
        result = quintet("bench", chat_model, "--json", "-p", "0", "-d", "2", *QUICK, *options)
        found.append(json.loads(result.out))
    plain, quantised = (one["rows"][0]["needs"]["weights"] for one in found)
    assert quantised < 0.4 * plain
    assert [one["quantize"] for one in found] == [None, "int8"]
    assert [one["weights"] for one in found] == ["float32", "int8 and float32"]


def test_a_cache_of_few_bits_is_fewer_bytes(quintet: Any, chat_model: Path) -> None:
    read = []
    for options in ([], *(["--cache-dtype", name] for name in CACHE_BITS)):
        result = quintet("bench", chat_model, "--json", "-p", "0", "-d", "5", *QUICK, *options)
        found = json.loads(result.out)
        assert found["cache_dtype"] == (options[1] if options else None)
        assert [row["test"] for row in found["rows"]] == ["tg2 @ d5"]
        read.append(found["rows"][0]["needs"]["cache"])
    # Of float32; each vector of a head has a scale of 16 bits.
    assert read == sorted(read, reverse=True)
    assert all(cache < 0.6 * read[0] for cache in read[1:])
    assert len(set(read)) == 4
    table = quintet("bench", chat_model, "-p", "0", "-d", "5", *QUICK, "--cache-dtype", "int4")
    assert ", cache in int4" in table.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--geometry", "qwen2-0.5b", "--revision", "v1"], "revision has no effect"),
        (["model", "--geometry", "qwen2-0.5b"], "Give either MODEL"),
        (["--geometry", "qwen3"], "there are qwen2-0.5b"),
        (["model", "-p", "4,x"], "is not whole numbers"),
        (["model", "-b", "0"], "a number below 1"),
        (["model", "--cache-dtype", "int5"], "is not one of"),
    ],
)
def test_what_cannot_be_measured(quintet: Any, arguments: list[str], said: str) -> None:
    result = quintet("bench", *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.is_one_screen
