"""What is counted of requests: as many as there were, and as long as it took."""

import asyncio
from typing import Any

import pytest

from quintet import demo_model
from quintet.auto import AutoModelForCausalLM
from quintet.errors import DeadlineError, EngineStoppedError, QueueFullError, ServingError
from quintet.serving import Engine, Limits
from quintet.serving.tally import Counted, Histogram, Marks, Tally


def of(counted: Counted) -> int:
    return sum(counted.counts)


def test_a_value_counts_up_to_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 7.0):
        histogram.add(value)
    assert histogram.seen() == Counted((1.0, 2.0), (2, 2, 1), 11.5)


def test_the_life_of_a_request() -> None:
    tally, marks = Tally(), Marks(arrival=10.0)
    assert marks.phase == "waiting"
    tally.admit(marks, 10.5)
    assert marks.phase == "reading"
    # A row that was given back is no second time in the queue.
    tally.admit(marks, 12.0)
    for now in (13.0, 13.25, 14.0):
        tally.write(marks, now)
    assert marks.phase == "writing"
    tally.finish(marks, 14.0, "stop", 7, 3)
    totals = {
        name: value.seen().total
        for name in Tally.__slots__
        if isinstance(value := getattr(tally, name), Histogram)
    }
    assert totals == {
        "queued": 0.5, "reading": 2.5, "writing": 1.0, "first": 3.0, "between": 1.0, "whole": 4.0,
        "prompts": 7, "answers": 3, "steps": 0, "pieces": 0, "overhead": 0,
    }  # fmt: skip
    assert of(tally.between.seen()) == 2
    assert tally.finished == {"stop": 1}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QueueFullError("x"), "queue_full"),
        (DeadlineError("x"), "deadline"),
        (EngineStoppedError("x"), "engine_stopped"),
        (ServingError("x"), "failed"),
        (ValueError("whatever somebody wrote"), "failed"),
    ],
)
def test_what_fails_is_counted_by_its_kind_alone(error: Exception, kind: str) -> None:
    tally = Tally()
    tally.fail(error)
    assert tally.failed == {kind: 1}


def test_an_engine_counts_what_it_does() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    options: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}

    async def one(engine: Engine, tokens: int) -> None:
        async for _ in engine.generate([5, 6, 7, 8], max_new_tokens=tokens, **options):
            pass

    async def gone(engine: Engine) -> None:
        answers = engine.generate([5, 6, 7], max_new_tokens=50, **options)
        await anext(answers)
        await answers.aclose()
        with pytest.raises(DeadlineError):
            async for _ in engine.generate([5], max_new_tokens=90, timeout=1e-9, **options):
                pass
        await one(engine, 2)

    async def everybody(engine: Engine) -> None:
        await asyncio.gather(*(one(engine, 5) for _ in range(6)))
        await gone(engine)

    with Engine(model, limits=Limits(rows=3, capacity=100)) as engine:
        asyncio.run(everybody(engine))
        state, tally = engine.state, engine.tally
        seen = {
            name: of(value.seen())
            for name in Tally.__slots__
            if isinstance(value := getattr(tally, name), Histogram)
        }
    assert (state.running, state.rows, state.waiting) == (0, 0, 0)
    assert tally.finished == {"length": 7}
    assert tally.failed == {"deadline": 1}
    assert tally.cancelled == {"writing": 1}
    assert (seen["whole"], seen["prompts"], seen["answers"]) == (7, 7, 7)
    assert seen["first"] == seen["queued"] == 8
    assert tally.answers.seen().total == 6 * 5 + 2
    assert seen["steps"] + seen["pieces"] == state.steps
    assert 0 < seen["overhead"] <= state.steps
