"""A model that many ask at once: each gets what it gets alone."""

import asyncio
import math
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, WIDE, Family, each
from generation.sequences import ENDS, prompt_of
from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model
from quintet.errors import (
    ContextLengthError,
    DeadlineError,
    EngineStoppedError,
    InputError,
    QueueFullError,
)
from quintet.generation import engine as generation
from quintet.generation.graphs import Graphs
from quintet.generation.rows import Rows
from quintet.serving import Answer, Engine, Limits
from simulated_gpu import Again
from waiting import PATIENCE, until


def limits(**changes: Any) -> Limits:
    return Limits(**{"rows": 3, "capacity": 100, "piece": 64, **changes})


def ids_of(answers: Iterator[Answer]) -> list[int]:
    return [token for answer in answers for token in answer.ids]


def slowly(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return scores


PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}
# Of 90 tokens: still under way whatever else the machine does meanwhile.
LONG: dict[str, Any] = {"max_new_tokens": 90, "logits_processor": [slowly], **PLAIN}


async def collected(engine: Engine, prompt: Any, **options: Any) -> list[Answer]:
    return [answer async for answer in engine.generate(prompt, **options)]


def options_of(row: int) -> dict[str, Any]:
    return {
        **ENDS,
        "max_new_tokens": 3 + row % 7,
        "do_sample": row % 2 == 1,
        **({"repetition_penalty": 1.3} if row % 3 == 1 else {}),
        **({"prompt_lookup_num_tokens": 3} if row % 4 == 2 else {}),
        **({"top_k": 5} if row % 5 == 3 else {}),
    }


@each
@pytest.mark.filterwarnings("ignore:.*has no effect without:UserWarning")
def test_each_gets_what_it_gets_alone(family: Family) -> None:
    model, count = family.model_of(max_position_embeddings=256), 14
    dice = random.Random(3)
    # Some begin as others did.
    prompts = [prompt_of(dice.choice((2, 9, 40, 85)), row) for row in range(count)]
    for row in range(0, count, 3):
        prompts[row] = torch.cat((prompt_of(66, 99), prompt_of(33 + row, row)), dim=1)

    def seeded(row: int) -> torch.Generator:
        return torch.Generator().manual_seed(row)

    async def everybody(engine: Engine) -> list[list[Answer]]:
        return await asyncio.gather(
            *(
                collected(engine, prompt, generator=seeded(row), **options_of(row))
                for row, prompt in enumerate(prompts)
            )
        )

    with Engine(model, limits=limits(capacity=200)) as engine:
        answers = asyncio.run(everybody(engine))
        state = engine.state
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, generator=seeded(row), **options_of(row))
        assert ids_of(iter(answers[row])) == alone[0, prompt.shape[1] :].tolist()
        last = answers[row][-1]
        assert last.usage is not None
        assert last.usage.prompt == prompt.shape[1]
        assert last.usage.completion == alone.shape[1] - prompt.shape[1]
        assert last.finish_reason in ("stop", "length")
        assert all(answer.finish_reason is None for answer in answers[row][:-1])
    assert state.generated == sum(a[-1].usage.completion for a in answers if a[-1].usage)
    # Where layers keep a state, it was kept where two were seen to part.
    assert state.cached >= 64
    assert state.running == state.waiting == 0


@each
@pytest.mark.parametrize(
    ("nbits", "graphs"), [(None, None), (8, None), (None, Again())], ids=["plain", "8", "recorded"]
)
def test_a_conversation_is_gone_on_from_where_it_is_stable(
    family: Family, nbits: int | None, graphs: Graphs | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn reads what is new in it, also where layers keep a state, and in few bits."""
    monkeypatch.setattr(generation, "graphs_of", lambda device: graphs)
    model = family.model_of(max_position_embeddings=512, **WIDE[family.name])
    own = {} if nbits is None else {"cache_implementation": "quantized", "cache_dtype": "int8"}
    system, expected, read = 70, [], []
    talk = prompt_of(130, 1)
    with Engine(model, limits=limits(capacity=400), nbits=nbits) as engine:
        for turn in range(3):
            # What follows the stable part is there to ask for an answer, and not in the next turn.
            asked = torch.cat((talk, prompt_of(2, 50)), dim=1)
            stable = (system, talk.shape[1])
            before = engine.state.read
            answers = list(engine.answer(asked, stable=stable, max_new_tokens=3, **PLAIN))
            usage = answers[-1].usage
            assert usage is not None
            expected.append(usage.cached)
            read.append(engine.state.read - before)
            answer = model.generate(asked, max_new_tokens=3, **own, **PLAIN)[:, asked.shape[1] :]
            assert ids_of(iter(answers)) == answer[0].tolist()
            talk = torch.cat((talk, answer, prompt_of(40, turn)), dim=1)
        # Another conversation under the same system prompt.
        other = torch.cat((prompt_of(130, 1)[:, :system], prompt_of(60, 77)), dim=1)
        *_, last = engine.answer(other, stable=system, max_new_tokens=1, **PLAIN)
        assert last.usage is not None
        expected.append(last.usage.cached)
    if model.config.recurrent_layers():
        assert expected == [0, 130, 173, 70]
        assert read == [132, 45, 45]
    else:
        assert expected == [0, 128, 128, 64]  # on the grid, with enough left to be read


@each
def test_what_many_ask_at_once_is_read_once(family: Family) -> None:
    """Equal prompts, and ones that share their beginning, wait for the first to have read it."""
    model = family.model_of(max_position_embeddings=512)
    shared, ends = prompt_of(200, 1), [prompt_of(40, 10 + n) for n in range(3)]
    prompts = [shared] * 4 + [torch.cat((shared[:, :150], end), dim=1) for end in ends]

    async def everybody(engine: Engine) -> list[list[Answer]]:
        asked = (collected(engine, one, max_new_tokens=4, **PLAIN) for one in prompts)
        return await asyncio.gather(*asked)

    with Engine(model, limits=limits(rows=8, capacity=300)) as engine:
        answers = asyncio.run(everybody(engine))
        state = engine.state
    for prompt, its in zip(prompts, answers, strict=True):
        alone = model.generate(prompt, max_new_tokens=4, **PLAIN)
        assert ids_of(iter(its)) == alone[0, prompt.shape[1] :].tolist()
    assert state.cached == 6 * 128
    assert state.read == sum(one.shape[1] for one in prompts) - 6 * 128


@each
def test_short_prompts_that_come_together_are_read_together(family: Family) -> None:
    """With the same answers, in fewer forwards than there are prompts."""
    model = family.model_of(max_position_embeddings=512)
    prompts, others_are_there = [prompt_of(40 + 9 * n, n) for n in range(5)], threading.Event()

    def waits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert others_are_there.wait(PATIENCE)
        return scores

    async def everybody(engine: Engine) -> list[list[Answer]]:
        own = {"max_new_tokens": 1, "logits_processor": [waits], **PLAIN}
        first = asyncio.create_task(collected(engine, prompt_of(5, 99), **own))
        asked = [
            asyncio.create_task(collected(engine, one, max_new_tokens=3, **PLAIN))
            for one in prompts
        ]
        # Each task asks before it waits for anything.
        await asyncio.sleep(0)
        others_are_there.set()
        await first
        return await asyncio.gather(*asked)

    with Engine(model, limits=limits(rows=8, capacity=300, piece=512)) as engine:
        answers = asyncio.run(everybody(engine))
        state = engine.state
    for prompt, its in zip(prompts, answers, strict=True):
        alone = model.generate(prompt, max_new_tokens=3, **PLAIN)
        assert ids_of(iter(its)) == alone[0, prompt.shape[1] :].tolist()
    assert state.read == 5 + sum(one.shape[1] for one in prompts)
    # The first, four at once, and one for which there was no room beside them.
    assert state.steps_by_kind["chunk"] == 3


def test_a_long_prompt_of_one_leaves_time_for_anothers() -> None:
    model = FAMILIES[0].model_of(max_position_embeddings=4096)

    read: list[int] = []

    def seen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take note of what had been read by then, in the engine's own thread."""
        read.append(engine.state.read)
        return scores

    async def both(engine: Engine) -> int:
        long = asyncio.create_task(
            collected(engine, prompt_of(3900, 1), scope="long", max_new_tokens=2, **PLAIN)
        )
        await asyncio.sleep(0)
        short = {"scope": "short", "max_new_tokens": 1, "logits_processor": [seen], **PLAIN}
        await collected(engine, prompt_of(200, 2), **short)
        await long
        return engine.state.read

    with Engine(model, limits=limits(capacity=4000)) as engine:
        assert asyncio.run(both(engine)) == 4100
    # Its four pieces came in turn with those of the other, which is far from its end.
    assert read[0] <= 200 + 64 * 8


@each
def test_one_that_gives_its_row_back_goes_on_as_it_was(family: Family) -> None:
    model, prompt = family.model_of(), prompt_of(20, 7)
    begun, asked = threading.Event(), threading.Event()

    def waits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Let nobody go on before both of the first have asked, and be done before the second."""
        assert begun.wait(PATIENCE)
        assert ids.shape[1] < 24 or asked.wait(PATIENCE)
        return scores

    # The second scope takes the row of one of the first, in the midst of its answer.
    with Engine(model, limits=limits(rows=2, patience=0.0)) as engine:

        async def talk() -> list[list[Answer]]:
            own = {"scope": "rich", "max_new_tokens": 30, "logits_processor": [waits], **PLAIN}
            rich = [
                asyncio.create_task(collected(engine, prompt_of(20, n), **own)) for n in range(2)
            ]
            await asyncio.sleep(0)
            begun.set()
            while engine.state.generated < 3 or engine.state.running < 2:
                await asyncio.sleep(0.001)
            poor = asyncio.create_task(
                collected(engine, prompt, scope="poor", max_new_tokens=4, **PLAIN)
            )
            await asyncio.sleep(0)
            asked.set()
            return await asyncio.gather(*rich, poor)

        answers = asyncio.run(talk())
        assert engine.state.preempted >= 1
    for n, (own, new) in enumerate([(prompt_of(20, 0), 30), (prompt_of(20, 1), 30), (prompt, 4)]):
        alone = model.generate(own, max_new_tokens=new, **PLAIN)[0, 20:]
        assert ids_of(iter(answers[n])) == alone.tolist()


def test_who_leaves_is_forgotten_within_a_step() -> None:
    model = FAMILIES[0].model_of()
    with Engine(model, limits=limits()) as engine:

        async def leave() -> None:
            answers = engine.generate(prompt_of(5, 1), **LONG)
            async for _ in answers:
                break
            await answers.aclose()
            task = asyncio.create_task(collected(engine, prompt_of(5, 1), **LONG))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while engine.state.running:
                await asyncio.sleep(0.001)

        asyncio.run(leave())
        assert engine.state.generated < 120
        assert ids_of(engine.answer(prompt_of(5, 1), max_new_tokens=4, **PLAIN))
    assert not engine.healthy


def test_a_loop_that_is_gone_leaves_the_others_alone() -> None:
    model = FAMILIES[0].model_of()
    with Engine(model, limits=limits()) as engine:
        loop = asyncio.new_event_loop()
        gone = engine.generate(prompt_of(5, 1), **LONG)
        loop.run_until_complete(anext(gone))
        loop.close()
        expected = model.generate(prompt_of(6, 2), max_new_tokens=8, **PLAIN)[0, 6:].tolist()
        assert ids_of(engine.answer(prompt_of(6, 2), max_new_tokens=8, **PLAIN)) == expected
        until(lambda: not engine.state.running)
    del gone


def test_many_come_and_leave_from_many_threads() -> None:
    model = FAMILIES[0].model_of()
    wrong: list[object] = []
    with Engine(model, limits=limits(rows=4, queue=200)) as engine:

        def client(seed: int) -> None:
            dice = random.Random(seed)
            for turn in range(6):
                prompt = prompt_of(dice.randint(1, 30), 10 * seed + turn)
                new, stays = dice.randint(1, 20), dice.randint(1, 25)
                made = []
                for answer in engine.answer(prompt, max_new_tokens=new, **PLAIN):
                    made += answer.ids
                    if len(made) >= stays:
                        break
                alone = model.generate(prompt, max_new_tokens=new, **PLAIN)[0, prompt.shape[1] :]
                if made != alone[: len(made)].tolist() or len(made) < min(stays, new):
                    wrong.append((seed, turn, made))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: not engine.state.running)
    assert wrong == []


def test_a_request_that_fails_fails_alone() -> None:
    model = FAMILIES[0].model_of()

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise LookupError("of the caller")

    with Engine(model, limits=limits()) as engine:

        async def both() -> list[Any]:
            return await asyncio.gather(
                collected(engine, prompt_of(5, 1), logits_processor=[broken], **PLAIN),
                collected(engine, prompt_of(5, 2), max_new_tokens=6, **PLAIN),
                return_exceptions=True,
            )

        failed, answer = asyncio.run(both())
        assert isinstance(failed, LookupError)
        alone = model.generate(prompt_of(5, 2), max_new_tokens=6, **PLAIN)[0, 5:]
        assert ids_of(iter(answer)) == alone.tolist()


def test_a_forward_that_fails_once_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, calls, failing = FAMILIES[0].model_of(), Rows.run, [0], [2]

    def sometimes(self: Rows, pieces: Any) -> Any:
        calls[0] += 1
        if calls[0] in failing:
            raise RuntimeError("once")
        return run(self, pieces)

    monkeypatch.setattr(Rows, "run", sometimes)
    with Engine(model, limits=limits()) as engine:
        answers = ids_of(engine.answer(prompt_of(5, 1), max_new_tokens=3, **PLAIN))
        # Two in which it has a part are one too many.
        calls[0], failing[:] = 0, [2, 3]
        with pytest.raises(RuntimeError, match="once"):
            ids_of(engine.answer(prompt_of(5, 1), max_new_tokens=6, **PLAIN))
        monkeypatch.setattr(Rows, "run", run)
        assert engine.healthy
        assert ids_of(engine.answer(prompt_of(5, 1), max_new_tokens=3, **PLAIN)) == answers
        alone = model.generate(prompt_of(5, 1), max_new_tokens=3, **PLAIN)[0, 5:]
        assert answers == alone.tolist()


def test_three_forwards_that_fail_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[0].model_of()
    with Engine(model, limits=limits()) as engine:

        def never(*_: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(Rows, "run", never)

        async def some() -> list[Any]:
            return await asyncio.gather(
                *(collected(engine, prompt_of(5, n), max_new_tokens=9) for n in range(5)),
                return_exceptions=True,
            )

        errors = asyncio.run(some())
        assert all(isinstance(error, RuntimeError | EngineStoppedError) for error in errors)
        assert any("the device is gone" in str(error) for error in errors)
        assert not engine.healthy
        with pytest.raises(EngineStoppedError, match="make another engine"):
            ids_of(engine.answer(prompt_of(5, 1)))


def test_what_cannot_be_is_refused_before_it_waits() -> None:
    model = FAMILIES[0].model_of()
    with Engine(model, limits=limits(queue=0, rows=1)) as engine:
        for wrong, told in (
            ({"prompt": "text"}, "no tokenizer"),
            ({"prompt": [5], "timeout": 0}, "timeout=0"),
            ({"prompt": [5], "stable": 1}, "stable=1"),
            ({"prompt": [5], "num_beams": 3}, "num_beams=3"),
            ({"prompt": [5], "temprature": 3}, "temprature"),
            ({"prompt": [5], "streamer": None}, "streamer"),
            ({"prompt": [1.5]}, "whole numbers"),
            ({"prompt": [True]}, "whole numbers"),
            *(({"prompt": p}, "the prompt is") for p in (None, 5, b"ab", {"a": 1}, [10**400])),
            *(({"prompt": [5], "scope": s}, "scope=") for s in ([], None, 5)),
            ({"prompt": [5], "salt": None}, "salt=None"),
            *(({"prompt": [5], "priority": p}, "priority=") for p in ("x", None, math.nan, True)),
            *(({"prompt": [5], "timeout": t}, "timeout=") for t in ("x", math.nan, 10**400, True)),
            *(({"prompt": [5], "stop": s}, "stop=") for s in ("ab", 5, None, (5,))),
            *(({"prompt": [5], "stable": s}, "stable=") for s in ("x", None, (0.5,), False)),
            ({"prompt": [5], "keep_special": "no"}, "keep_special='no'"),
            *(({"prompt": [5], "logprobs": n}, "logprobs=") for n in ("x", 1.5, -1)),
        ):
            with pytest.raises(InputError, match=told):
                next(engine.answer(**wrong))  # type: ignore[arg-type]
        with pytest.raises(ContextLengthError, match="do not fit a row of 100"):
            next(engine.answer([5], max_new_tokens=101))
        slow = engine.answer(prompt_of(5, 1), timeout=PATIENCE, **LONG)
        next(slow)
        with pytest.raises(QueueFullError, match="come again"):
            ids_of(engine.answer([5], max_new_tokens=2))
        slow.close()  # type: ignore[attr-defined]
        with pytest.raises(DeadlineError, match="longer timeout"):
            ids_of(engine.answer([7], timeout=1e-6, max_new_tokens=90, **PLAIN))
        late = engine.answer(prompt_of(5, 1), **LONG)
        next(late)
    with pytest.raises(EngineStoppedError, match="was closed"):
        ids_of(late)


def test_text_is_read_and_written() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    text = "def read_lines(path):"
    with Engine(model, tokenizer, limits(capacity=200)) as engine:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
        answers = list(engine.answer(text, use_mtp=True, **options))
        inputs = tokenizer(text, return_tensors="pt")
        made = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert "".join(one.text for one in answers) == tokenizer.decode(made)
        assert len(answers) < 24  # drafts hold
