"""From results to ratios and tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.suite import CASES, TARGETS, Target

CASE = "qwen2-0.5b tg @ 512 x1"


def record(**changes: Any) -> dict[str, Any]:
    return {
        "case": CASE,
        "geometry": "qwen2-0.5b",
        "kind": "decode",
        "tokens": 512,
        "batch": 1,
        "steps": 16,
        "results": {
            "quintet bf16": result([0.02, 0.03, 0.025], bytes=11 * 10**8),
            "transformers bf16": result([0.1, 0.05, 0.2]),
        },
        "bandwidth": {"bytes_per_second": 5e10, "how": "wide loads"},
        "gemm_flops_per_second": None,
        "conditions": {"turns": "every measurement", "others": 0.01, "stolen": 0.0},
        "machine": {
            "cpu": "CPU",
            "cores": 2,
            "memory": 2**34,
            "system": "Linux",
            "python": "3.11",
            "torch": "2.13",
        },
        "threads": 2,
        "commit": "abc1234",
        "changed": False,
        "command": "python -m benchmarks",
        "time": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def result(seconds: list[float], **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "peak_memory": 2**30, "load_seconds": [1.0, 3.0, 2.0], **more}


def target(against: str, case: str = CASE) -> Target:
    return Target("label", case, "quintet bf16", against, 1.0)


def test_a_ratio_is_of_medians() -> None:
    assert report.ratio(target("transformers bf16"), [record()]) == pytest.approx(4.0)


def test_the_floor_is_bytes_over_bandwidth() -> None:
    assert report.ratio(target("floor"), [record()]) == pytest.approx(0.022 / 0.025)


def test_the_floor_of_many_rows_is_the_longer_of_bytes_and_products() -> None:
    many = record()
    many["gemm_flops_per_second"] = 1e12
    many["results"]["quintet bf16"]["flops"] = 2e9
    assert report.ratio(target("floor"), [many]) == pytest.approx(0.022 / 0.025)
    many["results"]["quintet bf16"]["flops"] = 2.4e10
    assert report.ratio(target("floor"), [many]) == pytest.approx(0.024 / 0.025)


def test_the_floor_of_a_prompt_is_products_over_the_peak() -> None:
    prompt = record(
        kind="prefill",
        results={"quintet bf16": result([2.0], flops=4e11)},
        gemm_flops_per_second=4e11,
    )
    assert report.ratio(target("floor"), [prompt]) == pytest.approx(0.5)


def test_another_case_is_compared_by_tokens_a_second() -> None:
    eight = record(case="eight", batch=8, results={"quintet bf16": result([0.05])})
    assert report.ratio(target(CASE, "eight"), [record(), eight]) == pytest.approx(4.0)


def test_the_newest_record_with_both_sides_counts() -> None:
    alone = record(commit="new", results={"quintet bf16": result([0.001])})
    newer = record(
        commit="newer",
        results={"quintet bf16": result([0.01]), "transformers bf16": result([0.1])},
    )
    assert report.ratio(target("transformers bf16"), [record(), alone]) == pytest.approx(4.0)
    assert report.ratio(target("transformers bf16"), [record(), newer]) == pytest.approx(10.0)


def test_what_is_not_there_has_no_ratio() -> None:
    failed = record(results={"quintet bf16": result([], error="InputError: no int8")})
    assert report.ratio(target("transformers bf16"), []) is None
    assert report.ratio(target("floor"), [failed]) is None
    assert report.ratio(target("llama.cpp BF16"), [record()]) is None


def test_sittings_at_one_commit_are_pooled() -> None:
    later = record(results={"quintet bf16": result([0.5])}, time="2026-01-02")
    other = record(commit="other", time="2026-01-03")
    first, second = report.pooled([record(), later, other])
    assert first["results"]["quintet bf16"]["seconds"] == [0.02, 0.03, 0.025, 0.5]
    assert first["results"]["transformers bf16"]["seconds"] == [0.1, 0.05, 0.2]
    assert second["commit"] == "other"


def test_the_tables(tmp_path: Path) -> None:
    failed = record(
        case="qwen2-0.5b pp512 x1",
        kind="prefill",
        results={"quintet int8": result([], error="InputError: no int8")},
    )
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (record(), failed)))
    text = report.render(report.read([path]))
    assert "context 512 | quintet bf16 | transformers bf16 | ≥ 3.50 | 4.00 | yes |" in text
    assert "| quintet bf16 | floor | ≥ 0.80 | 0.88 | yes |" in text
    assert "| quintet bf16 | llama.cpp BF16 | ≥ 1.10 |  | not measured |" in text
    assert "not available: InputError: no int8" in text
    assert (
        "25.00 ms (20.00 - 30.00), 40.0 tok/s, 0.88 of the floor, peak 1.00 GiB | 2.00 | "
        "every measurement | 50.0, 0 | 1%, 0% |"
    ) in text
    assert "Commits: abc1234." in text


def test_every_target_is_of_a_case_that_is_measured() -> None:
    cases = {case.name: {c.name for c in case.contenders} for case in CASES}
    assert len(cases) == len(CASES)
    for each in TARGETS:
        assert each.ours in cases[each.case]
        assert (
            each.against == "floor"
            or each.against in cases[each.case]
            or each.ours in cases[each.against]
        )
