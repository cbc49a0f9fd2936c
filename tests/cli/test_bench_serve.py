"""`quintet bench serve`: a table, JSON, and what cannot be measured."""

import json
from typing import Any

import pytest

from measurement.fakeserver import FakeServer

QUICK = ("--own", "10", "--shared", "6", "--out", "3")


def test_the_table(quintet: Any) -> None:
    with FakeServer().running() as fake:
        result = quintet("bench", "serve", fake.url, "-c", "2", "-n", "4", "-q", *QUICK)
    assert (result.code, result.err) == (0, "")
    header, rule, first, between, token, end, gap, answered, rates, prompts = (
        result.out.splitlines()
    )
    assert header.split("|")[2].strip() == "mean"
    assert len({len(line) for line in (header, rule, first, between, token, end)}) == 1
    assert gap == ""
    assert answered.startswith("4 of 4 requests answered in ")
    assert "tok/s out, " in rates
    assert prompts == "prompts of 16 tokens, 50% of them read before"


def test_for_programs(quintet: Any) -> None:
    with FakeServer().running() as fake:
        result = quintet(
            "bench", "serve", f"{fake.url}/v1", "--rate", "500", "-n", "5", "--json", *QUICK,
            "--goodput", "ttft:10000", "--body", '{"top_k": 2}', "--warm", "0",
        )  # fmt: skip
    found = json.loads(result.out)
    assert (found["model"], found["prompts"], found["workload"]) == ("fake", "ids", "chat")
    assert found["shape"] == {
        "shared": 6, "own": 10, "out": 3, "turns": 1, "grows": 0, "drops": 0.0,
    }  # fmt: skip
    assert found["load"]["rate"] == 500
    assert found["requests"]["answered"] == 5
    assert found["good"]["share"] == 1
    assert fake.asked[-1]["top_k"] == 2


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["127.0.0.1:9"], "nobody answers", 1),
        (["ftp://a"], "is no address of a server", 2),
        (["x", "--body", "[1]"], "is no JSON object", 2),
        (["x", "--body", "[" * 10_000], "is no JSON object", 2),
        (["x", "--goodput", "fast"], "is no goal", 2),
        (["x", "--drops", "2"], "is a share of the requests", 2),
        (["x", "--rate", "-1"], "has to be above 0", 2),
        (["x", "--rate", "nan"], "has to be above 0", 2),
        (["x", "--seconds", "inf"], "has to be above 0", 2),
        (["x", "--timeout", "nan"], "timeout=nan has to be above 0", 2),
        (["x", "--timeout", "0"], "timeout=0.0 has to be above 0", 2),
        (["x", "--own", "2000000000"], "beyond any model's context", 2),
        (["x", "--clients", "2000000000"], "no more than 65,535 connections", 2),
        ([], "Missing argument", 2),
    ],
)
def test_what_cannot_be_measured(quintet: Any, arguments: list[str], said: str, code: int) -> None:
    result = quintet("bench", "serve", *arguments)
    assert result.code == code
    assert said in result.err
    assert result.is_one_screen
