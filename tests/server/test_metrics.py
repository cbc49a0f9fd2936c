"""What Prometheus is told: in its format, as it happens, and nothing that anybody wrote."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from quintet.errors import DeadlineError
from quintet.serving import Engine
from served import Running, serving
from waiting import PATIENCE, until

CANARY = "xylophone-canary-4711"
LABELS = {
    "model", "route", "method", "code", "kind", "why", "phase", "finished_reason", "le", "version",
    "reason",
}  # fmt: skip
Numbers = dict[str, float]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as it:
        yield it


def scraped(server: Running) -> Numbers:
    """Return all samples, by the name with the labels but the model's."""
    answer = server.ask("GET", "/metrics")
    assert answer.status == 200
    numbers: Numbers = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            assert set(sample.labels) <= LABELS
            labels = {k: v for k, v in sample.labels.items() if k != "model"}
            shown = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            numbers[f"{sample.name}{{{shown}}}" if shown else sample.name] = sample.value
    return numbers


def moved(server: Running, act: Callable[[], object]) -> Numbers:
    """Return by how much numbers moved, of those that did."""
    before = scraped(server)
    act()
    engine = server.service.registry.engines["demo"]
    # What is told comes before it is counted.
    until(lambda: not (engine.turning or engine.state.running or engine.state.waiting))
    until(lambda: not server.service.under_way)
    after = scraped(server)
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if value != before.get(name, 0.0)
    }


def generated(server: Running, tokens: int, **options: Any) -> None:
    engine = server.service.registry.engines["demo"]
    for _ in engine.answer([5, 6, 7], max_new_tokens=tokens, eos_token_id=-1, **options):
        pass


def test_the_format_is_what_scrapers_ask_for(server: Running) -> None:
    plain = server.ask("GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    other = server.ask("GET", "/metrics", headers=accept)
    assert other.headers["content-type"].startswith("application/openmetrics-text")
    generated(server, 2)
    names = {one.name for one in openmetrics.text_string_to_metric_families(other.body.decode())}
    assert {"quintet_build", "quintet_num_requests_running", "quintet_generation_tokens"} <= names
    assert all(name.startswith(("quintet_", "process_")) for name in names)


def test_counters_move_as_requests_do(server: Running) -> None:
    found = moved(server, lambda: generated(server, 6, do_sample=False))
    assert found["quintet_request_success_total{finished_reason=length}"] == 1
    assert found["quintet_generation_tokens_total"] == 6
    assert found["quintet_prompt_tokens_total"] == 3
    assert found["quintet_engine_steps_total"] >= 6
    for name, times in (
        ("time_to_first_token_seconds", 1),
        ("inter_token_latency_seconds", 5),
        ("request_queue_time_seconds", 1),
        ("request_prefill_time_seconds", 1),
        ("request_decode_time_seconds", 1),
        ("e2e_request_latency_seconds", 1),
        ("request_prompt_tokens", 1),
        ("request_generation_tokens", 1),
    ):
        assert found[f"quintet_{name}_count"] == times
        # The classes of a histogram are of what is below them, all of it in the last.
        assert found[f"quintet_{name}_bucket{{le=+Inf}}"] == times
    assert found["quintet_request_generation_tokens_sum"] == 6
    assert found["quintet_engine_step_seconds_count{kind=decode}"] == 5


def test_requests_are_counted_by_their_route(server: Running) -> None:
    def act() -> None:
        server.ask("GET", "/v1/models/demo")
        server.ask("GET", f"/v1/models/{CANARY}")
        server.ask("GET", f"/{CANARY}")
        server.ask("POST", "/version", {})
        server.ask("TEAPOT", "/version")

    found = moved(server, act)
    assert found["quintet_http_requests_total{code=200,method=GET,route=/v1/models/{name}}"] == 1
    assert found["quintet_http_requests_total{code=404,method=GET,route=/v1/models/{name}}"] == 1
    assert found["quintet_http_requests_total{code=404,method=GET,route=none}"] == 1
    assert found["quintet_http_requests_total{code=405,method=POST,route=/version}"] == 1
    assert found["quintet_http_requests_total{code=405,method=other,route=/version}"] == 1
    assert found["quintet_http_request_seconds_count{route=/version}"] == 2
    assert found["quintet_request_errors_total{code=model_not_found}"] == 1
    assert found["quintet_request_errors_total{code=route_not_found}"] == 1
    assert found["quintet_request_errors_total{code=method_not_allowed}"] == 2
    assert CANARY not in server.ask("GET", "/metrics").body.decode()


def test_who_leaves_is_counted_by_how_far_it_was(server: Running) -> None:
    engine = server.service.registry.engines["demo"]

    async def leave(engine: Engine) -> None:
        answers = engine.generate([5, 6, 7], max_new_tokens=100, eos_token_id=-1)
        await anext(answers)
        await answers.aclose()

    def late() -> None:
        with pytest.raises(DeadlineError):
            generated(server, 100, timeout=1e-9)

    found = moved(server, lambda: asyncio.run(leave(engine)))
    assert found["quintet_disconnects_total{phase=writing}"] == 1
    assert not any("success" in name for name in found)
    assert moved(server, late)["quintet_engine_failures_total{kind=deadline}"] == 1


def test_forms_are_counted(server: Running) -> None:
    def ask(**body: Any) -> int:
        given = {"model": "demo", "prompt": "a", "max_tokens": 4, **body}
        return server.ask("POST", "/v1/completions", given).status

    found = moved(server, lambda: ask(regex="[ab]{9}"))
    assert found["quintet_grammar_compile_seconds_count"] == 1
    assert 3 <= found["quintet_grammar_masks_total"] <= 5
    assert found["quintet_grammar_mask_seconds_total"] > 0
    found = moved(server, lambda: ask(regex="(("))
    assert found["quintet_grammar_refusals_total{reason=invalid}"] == 1
    assert found["quintet_grammar_compile_seconds_count"] == 1
    numbers = scraped(server)
    assert numbers["quintet_grammar_compiling"] == numbers["quintet_grammar_late"] == 0


def test_how_full_rows_are_is_a_share_of_what_they_may_hold(server: Running) -> None:
    engine, goes_on = server.service.registry.engines["demo"], threading.Event()

    def halt(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert ids.shape[1] == 9 or goes_on.wait(PATIENCE)
        return logits

    answers = engine.answer(range(1, 10), max_new_tokens=3, logits_processor=[halt])
    next(answers)
    numbers = scraped(server)
    goes_on.set()
    assert list(answers)
    held = numbers["quintet_rows_bytes"]
    assert held == engine.room.token * 10
    assert numbers["quintet_kv_cache_usage_ratio"] == pytest.approx(held / engine.room.whole)


def test_an_idle_server_holds_nothing(server: Running) -> None:
    # The scrape itself; others may just be leaving.
    until(lambda: scraped(server)["quintet_http_requests_under_way"] == 1)
    numbers = scraped(server)
    held = ("num_requests_running", "num_requests_waiting", "rows_bytes", "kv_cache_usage_ratio")
    for name in held:
        assert numbers[f"quintet_{name}"] == 0
    assert numbers["quintet_healthy"] == 1
    assert numbers["quintet_draining"] == 0
    assert numbers["quintet_rows"] == 4
    assert numbers["process_resident_memory_bytes"] > 1e7


def test_the_guide_names_all_of_them(server: Running) -> None:
    """And no other, in its tables and in what it asks them."""
    generated(server, 2)
    server.ask("GET", "/nothing")
    said = server.ask("GET", "/metrics").body.decode()
    shown = {
        family.name.removesuffix("_info")
        for family in text_string_to_metric_families(said)
        if family.name.startswith("quintet_") and not family.name.endswith("_created")
    }
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "metrics.md").read_text()
    told = set(re.findall(r"^\| `(quintet_\w+)` \|", guide, re.MULTILINE))
    asked = set(re.findall(r"quintet_\w+", guide)) - {"quintet_"}
    assert told == shown
    assert {re.sub(r"_(total|bucket)$", "", name) for name in asked} == told


def test_servers_count_apart() -> None:
    with serving() as one, serving() as other:
        one.ask("GET", "/version")
        name = "quintet_http_requests_total{code=200,method=GET,route=/version}"
        assert scraped(one)[name] == 1
        assert name not in scraped(other)
