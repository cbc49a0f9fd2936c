"""What goes wrong ends what it is the affair of, and nothing else; and is counted."""

import asyncio
import time
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from generation.sequences import prompt_of
from quintet.errors import (
    ContextLengthError,
    DeadlineError,
    InputError,
    NonFiniteError,
    QueueFullError,
    ServingError,
    StepFailedError,
)
from quintet.generation.engine import Engine as StepEngine
from quintet.generation.rows import Rows
from quintet.serving import Answer, Engine, Limits
from quintet.serving.figures import kind_of
from waiting import until

PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}
# A token whose vector is no numbers; none of those that are asked or made.
BROKEN = 3


def limits(**changes: Any) -> Limits:
    return Limits(**{"rows": 4, "capacity": 100, "piece": 64, **changes})


def slowly(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return scores


async def collected(engine: Engine, prompt: Any, **options: Any) -> list[Answer]:
    return [answer async for answer in engine.generate(prompt, **options)]


def made(answers: list[Answer]) -> list[int]:
    return [token for answer in answers for token in answer.ids]


def broken_model(family: Family) -> Any:
    model = family.model_of(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = torch.nan
    return model


@each
def test_numbers_that_are_not_finite_end_their_own_request(family: Family) -> None:
    """Others in the same steps, and those who get the row afterwards, have what they have alone."""
    model, options = broken_model(family), {**PLAIN, "suppress_tokens": [BROKEN]}
    prompts = [prompt_of(20 + 3 * n, n) for n in range(6)]
    bad = prompts[5].clone()
    bad[0, 7] = BROKEN
    alone = [
        model.generate(one, max_new_tokens=8, **options)[0, one.shape[1] :].tolist()
        for one in prompts
    ]

    async def everybody(engine: Engine) -> list[Any]:
        asked = [
            *(collected(engine, one, max_new_tokens=8, **options) for one in prompts[:3]),
            collected(engine, bad, max_new_tokens=8, **options),
            collected(engine, bad, max_new_tokens=1, prompt_logprobs=0, **options),
            engine.embed(bad),
            *(collected(engine, one, max_new_tokens=8, **options) for one in prompts[3:]),
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    with Engine(model, limits=limits()) as engine:
        answers = asyncio.run(everybody(engine))
        state = engine.state
        assert engine.healthy
    assert [made(one) for one in (*answers[:3], *answers[6:])] == alone
    for error in answers[3:6]:
        assert isinstance(error, NonFiniteError)
        assert error.code == "nonfinite"
        assert not error.retryable
    assert state.running == 0
    assert state.failed["nonfinite"] >= 2
    assert state.finished == {"length": 7}  # embeddings are asked of what was read


def test_want_of_memory_fails_those_who_had_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, calls = FAMILIES[0].model_of(), Rows.run, [0]

    def sometimes(self: Rows, pieces: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 4, 6, 8):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")
        return run(self, pieces)

    with Engine(model, limits=limits()) as engine:
        expected = made(list(engine.answer(prompt_of(5, 1), max_new_tokens=9, **PLAIN)))
        monkeypatch.setattr(Rows, "run", sometimes)
        for _ in range(4):
            with pytest.raises(StepFailedError, match="not enough memory") as caught:
                list(engine.answer(prompt_of(5, 1), max_new_tokens=9, **PLAIN))
            assert caught.value.retryable
        assert engine.state.failed == {"step": 4}
        # That is no reason to stop.
        assert engine.healthy
        assert made(list(engine.answer(prompt_of(5, 1), max_new_tokens=9, **PLAIN))) == expected


def test_a_row_that_there_is_no_memory_for_may_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no fault of the server's, nor of what was asked."""
    model, usual, short = FAMILIES[0].model_of(), StepEngine.add, [True]

    def add(self: StepEngine, sequence: Any, *contents: Any) -> None:
        if short[0]:
            raise torch.OutOfMemoryError("there is none")
        usual(self, sequence, *contents)

    monkeypatch.setattr(StepEngine, "add", add)
    with Engine(model, limits=limits()) as engine:
        with pytest.raises(StepFailedError, match="come again") as refused:
            list(engine.answer(prompt_of(9, 1), max_new_tokens=2))
        assert refused.value.retryable
        short[0] = False
        assert made(list(engine.answer(prompt_of(9, 1), max_new_tokens=2, **PLAIN)))
        assert engine.healthy


@each
def test_who_came_last_gives_way_where_memory_is_short(family: Family) -> None:
    """The step fails halfway, with recurrent layers ahead; the others have what they have alone."""
    model, failed = family.model_of(**family.shallow), [False]

    def allocates(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[:2].numel() == 3 and not failed[0]:
            failed[0] = True
            raise torch.OutOfMemoryError("CUDA out of memory")

    prompts = [prompt_of(length, length) for length in (64, 65, 66)]
    alone = [
        model.generate(one, max_new_tokens=40, **PLAIN)[0, one.shape[1] :].tolist()
        for one in prompts
    ]
    model.model.layers[-1].register_forward_pre_hook(allocates)

    async def everybody(engine: Engine) -> list[Any]:
        asked = (collected(engine, one, max_new_tokens=40, **PLAIN) for one in prompts)
        return await asyncio.gather(*asked, return_exceptions=True)

    with Engine(model, limits=limits(capacity=110)) as engine:
        *others, last = asyncio.run(everybody(engine))
        assert engine.healthy
        assert engine.state.failed == {"step": 1}
    assert isinstance(last, StepFailedError)
    assert last.retryable
    assert failed[0]
    assert [made(one) for one in others] == alone[:2]


def test_who_is_alone_and_short_of_memory_again_and_again_ends_the_engine() -> None:
    model = FAMILIES[0].model_of()

    def allocates(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(model, limits=limits()) as engine:
        model.model.layers[-1].register_forward_pre_hook(allocates)
        for _ in range(3):
            with pytest.raises(StepFailedError, match="first to give way"):
                list(engine.answer(prompt_of(5, 1), **PLAIN))
        until(lambda: not engine.healthy)


def test_an_adapter_that_is_taken_away_ends_its_requests_alone() -> None:
    from quintet import LoraConfig

    model = FAMILIES[0].model_of()
    for name in ("stays", "goes"):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
    model.eval()

    async def talk(engine: Engine) -> list[Any]:
        going = [
            asyncio.create_task(
                collected(engine, prompt_of(9, 1), adapter_name=name, max_new_tokens=80, **PLAIN)
            )
            for name in ("stays", "goes")
        ]
        while engine.state.generated < 8:
            await asyncio.sleep(0.001)
        model.delete_adapter("goes")
        return await asyncio.gather(*going, return_exceptions=True)

    with Engine(model, limits=limits()) as engine:
        stays, goes = asyncio.run(talk(engine))
        assert engine.healthy
    assert isinstance(goes, InputError)
    assert "'goes'" in str(goes)
    assert len(made(stays)) == 80


def test_what_is_done_is_counted() -> None:
    model, prompt = FAMILIES[0].model_of(), prompt_of(96, 1)
    with Engine(model, limits=limits(queue=0, rows=1)) as engine:
        list(engine.answer(prompt, max_new_tokens=5, **PLAIN))
        # Enough of it is left for the kernels that read prompts.
        prompt = torch.cat((prompt, prompt_of(1, 1)), dim=1)
        list(engine.answer(prompt, max_new_tokens=4, prompt_lookup_num_tokens=2, **PLAIN))
        slow = engine.answer(prompt_of(5, 2), max_new_tokens=90, logits_processor=[slowly], **PLAIN)
        next(slow)
        with pytest.raises(QueueFullError):
            list(engine.answer([7], max_new_tokens=1))
        slow.close()  # type: ignore[attr-defined]
        with pytest.raises(DeadlineError):
            list(engine.answer([7], max_new_tokens=90, timeout=1e-6))
        until(lambda: not engine.state.running)
        # What is told comes before it is counted.
        list(engine.answer([7], max_new_tokens=1, **PLAIN))
    state = engine.state
    assert state.steps == sum(state.steps_by_kind.values())
    assert {*state.steps_by_kind} <= {"chunk", "decode", "verify"}
    for kind, count in state.steps_by_kind.items():
        assert state.step_seconds[kind].count == count
    assert state.queried == 96 + 97 + 5 + 1
    assert state.cached == 64
    assert state.restored == 1
    assert state.copied["hit"] > 0
    assert state.copied["kept"] > 0
    assert state.finished == {"length": 3, "cancelled": 1}
    assert state.failed == {"queue_full": 1, "deadline": 1}
    assert state.queue_seconds.count == state.first_token_seconds.count == 4
    assert state.between_seconds.count >= 4
    assert state.overhead_seconds > 0
    assert state.accepted <= state.drafted
    for waited in (state.queue_seconds, state.prefill_seconds, state.decode_seconds):
        assert len(waited.counts) == len(waited.bounds) + 1
        assert waited.total >= 0


def test_errors_have_words_that_stay() -> None:
    def kinds(of: type[ServingError]) -> list[type[ServingError]]:
        return [of, *(kind for child in of.__subclasses__() for kind in kinds(child))]

    assert {kind.code for kind in kinds(ServingError)} == {
        "serving_error", "queue_full", "deadline_exceeded", "nonfinite", "step_failed",
        "engine_stopped",
    }  # fmt: skip
    assert kind_of(ContextLengthError("x")) == kind_of(LookupError("x")) == "request"
