"""What long runs of servers come to: when something is wrong, and the tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import KINDS
from benchmarks.serving_files import write_tokenizer
from benchmarks.serving_findings import Finding, table
from benchmarks.serving_load import render
from benchmarks.soak import slope, verdict
from quintet import AutoTokenizer
from quintet.measurement.serving.workload import WORDS


def result(**changes: Any) -> dict[str, Any]:
    steady = {"idle_before": 9, "idle_after": 9, "most": 30}
    idle = {"running": 0, "waiting": 0}
    return {
        "statuses": {"200": 90, "503": 2},
        "garbage": {"400": 9, "404": 1},
        "unfinished": [],
        "memory_bytes_in_10_minutes": 2e5,
        "threads": steady,
        "descriptors": steady,
        "load_after": {"models": {"demo": idle}},
        "metrics_after": {'quintet_rows_bytes{model="demo"}': 0.0},
        "exit_code": 0,
        **changes,
    }


def test_nothing_is_wrong() -> None:
    assert verdict(result()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statuses": {"200": 9, "500": 1}}, "answered with {'500': 1}"),
        ({"garbage": {"502": 2}}, "answered with {'502': 2}"),
        ({"garbage": {"200": 3}}, "3 requests were answered that are none"),
        ({"unfinished": ["a", "b"]}, "2 answers without an end"),
        ({"memory_bytes_in_10_minutes": 3e6}, "memory grows by 2.86 MiB in 10 minutes"),
        ({"threads": {"idle_before": 9, "idle_after": 10}}, "threads: 9 before, 10 behind"),
        ({"descriptors": {"idle_before": 7, "idle_after": 9}}, "descriptors: 7 before, 9 behind"),
        ({"load_after": {"models": {"a": {"running": 1, "waiting": 0}}}}, "a is not idle"),
        ({"metrics_after": {"quintet_rows_bytes{}": 5.0}}, "rows hold 5 bytes"),
        ({"exit_code": None}, "the server ended with None"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], said: str) -> None:
    (only,) = verdict(result(**changes))
    assert said in only


def test_the_slope_of_a_line() -> None:
    assert slope([(x, 3.0 * x + 7) for x in range(5)]) == pytest.approx(3)
    assert slope([(0, 1), (1, 3), (2, 2)]) == pytest.approx(0.5)
    assert slope([(1, 5)]) == slope([]) == 0


def record(contender: str, clients: int, rate: float | None) -> dict[str, Any]:
    made = {
        "model_on_disk": "m",
        "workload": "chat",
        "contender": contender,
        "clients": clients,
        "load_on_machine": {"others": 0.25},
    }
    if rate is None:
        return {**made, "error": "no result in time"}
    return {
        **made,
        "per_second": {"completion_tokens": rate},
        "ttft": {"p50": 1.5},
        "itl": None,
        "tokens": {"prompt": 100, "cached": 25},
    }


def test_tables_are_of_medians() -> None:
    records = [
        *(record("ours", 8, rate) for rate in (10, 30, 20)),
        record("theirs", 8, 123.4),
        record("ours", 16, 40),
        record("theirs", 16, None),
    ]
    lines = render(records).splitlines()
    start = lines.index("## m, chat: tok/s")
    assert lines[start + 2 : start + 6] == [
        "| clients | ours | theirs |",
        "|---|---|---|",
        "| 8 | 20 | 123 |",
        "| 16 | 40 | - |",
    ]
    assert "| 8 | 0.25 | 0.25 |" in lines
    assert lines[-1] == "Others took up to 25% of the processor meanwhile."


def test_every_id_has_a_text_and_every_word_is_a_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 3000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 3000
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in WORDS)
    assert tokenizer.decode([2900]) == " w2900"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>assistant\n")


def test_servers_are_asked_for_what_they_know() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    theirs = next(kind for kind in KINDS if kind.name == "transformers bf16")
    config = theirs.body["generation_config"].format(out=7)
    assert json.loads(config) == {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}


def test_a_target_is_a_least_or_a_most() -> None:
    for measured, least, met in ((0.96, True, False), (0.97, True, True), (0.98, True, True)):
        assert Finding("T2", "x", 0.97, measured, least=least).met == met
        assert Finding("T4", "x", 0.97, measured).met == (measured <= 0.97)
    rows = table(
        [
            Finding("T2", "one client", 0.97, 0.9, least=True),
            Finding("T5", "a gap", 220, 199.6, unit=" ms"),
        ]
    ).splitlines()
    assert rows[2:] == [
        "| T2 | one client | ≥ 0.97 | 0.9 | missed |",
        "| T5 | a gap | ≤ 220 ms | 200 ms | met |",
    ]
