"""Drafts in the batch: the text is what it is without, and they stop where they cost."""

import asyncio
import random
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from generation.sequences import ENDS, prompt_of
from quintet.errors import InputError
from quintet.generation.speculative.pacing import DRAFTS, Pacing, room_for_drafts
from quintet.serving import Answer, Engine, Limits, Usage

PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}


def limits(**changes: Any) -> Limits:
    return Limits(**{"rows": 12, "capacity": 120, "piece": 64, **changes})


async def collected(engine: Engine, prompt: Any, **options: Any) -> list[Answer]:
    return [answer async for answer in engine.generate(prompt, **options)]


def made(answers: list[Answer]) -> list[int]:
    return [token for answer in answers for token in answer.ids]


def usage(answers: list[Answer]) -> Usage:
    assert answers[-1].usage is not None
    return answers[-1].usage


@each
def test_many_rows_draft_as_far_as_there_is_room_and_have_their_text(family: Family) -> None:
    """Rows come and leave, so that there is room for drafts at times; some draw by their own."""
    model, dice = family.model_of(), random.Random(5)
    ways = ["lookup"]
    if family.name == "deepseek-v3" and model.prediction_depth():
        ways.append("mtp")
    asked = [
        (
            prompt_of(dice.randint(2, 40), row % 3),
            {
                **ENDS,
                "max_new_tokens": dice.randint(4, 30),
                "do_sample": row % 4 == 3,
                "speculate": ways[row % len(ways)],
            },
        )
        for row in range(12)
    ]

    def seeded(row: int) -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(row)}

    async def everybody(engine: Engine) -> list[list[Answer]]:
        return await asyncio.gather(
            *(collected(engine, one, **own, **seeded(n)) for n, (one, own) in enumerate(asked))
        )

    with Engine(model, limits=limits()) as engine:
        answers = asyncio.run(everybody(engine))
        state = engine.state
    for row, (prompt, own) in enumerate(asked):
        options = {name: value for name, value in own.items() if name != "speculate"}
        if own["speculate"] == "mtp" and own["do_sample"]:
            options["use_mtp"] = True
        elif own["do_sample"]:
            options["prompt_lookup_num_tokens"] = 3
        alone = model.generate(prompt, **options, **seeded(row))[0, prompt.shape[1] :]
        assert made(answers[row]) == alone.tolist()
    assert state.drafted == sum(usage(one).drafted for one in answers) > 0
    assert state.accepted >= sum(usage(one).accepted for one in answers)
    assert state.steps_by_kind["verify"] > 0


def test_a_default_is_for_those_who_do_not_say() -> None:
    model, prompt = FAMILIES[0].model_of(), prompt_of(30, 1).repeat(1, 2)
    with Engine(model, limits=limits(), speculate="lookup") as engine:
        options = {"max_new_tokens": 30, **PLAIN}
        drafts, plain = (
            list(engine.answer(prompt, **options, **own)) for own in ({}, {"speculate": "off"})
        )
        assert made(drafts) == made(plain)
        assert usage(drafts).drafted > 0 == usage(plain).drafted
        # Who draws by a generator of its own has the text that generate() gives it.
        own = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": -1}
        drawn = list(engine.answer(prompt, generator=torch.Generator().manual_seed(1), **own))
        alone = model.generate(prompt, generator=torch.Generator().manual_seed(1), **own)
        assert made(drawn) == alone[0, 60:].tolist()
        for wrong, told in (
            ({"speculate": "mtp"}, "use_mtp=True needs layers"),
            ({"speculate": "guess"}, "one of off, mtp, lookup"),
            ({"speculate": "lookup", "prompt_lookup_num_tokens": 2}, "both say how"),
        ):
            with pytest.raises(InputError, match=told):
                next(engine.answer(prompt, **wrong))
    with pytest.raises(InputError, match="'mtp' needs layers"):
        Engine(model, limits=limits(), speculate="mtp")
    with pytest.raises(InputError, match="one of off"):
        Engine(model, limits=limits(), speculate="yes")  # type: ignore[arg-type]


def test_a_full_step_checks_no_drafts() -> None:
    model = FAMILIES[0].model_of()

    async def everybody(engine: Engine) -> list[list[Answer]]:
        # They begin in the same steps, and end in the same one.
        prompts = [prompt_of(4, 1).repeat(1, 5) for _ in range(9)]
        asked = (collected(engine, one, max_new_tokens=20, **PLAIN) for one in prompts)
        return await asyncio.gather(*asked)

    with Engine(model, limits=limits(), speculate="lookup") as engine:
        alone = list(engine.answer(prompt_of(4, 1).repeat(1, 5), max_new_tokens=20, **PLAIN))
        drafted = usage(alone).drafted
        assert drafted > 0
        answers = asyncio.run(everybody(engine))
    assert [made(one) for one in answers] == [made(alone)] * 9
    # Only while not all of them were there yet, or no longer.
    assert sum(usage(one).drafted for one in answers) < 9 * drafted / 2
    assert [room_for_drafts(rows, few_bits=False) for rows in (1, 4, 8, 9, 16)] == [15, 3, 1, 0, 0]
    assert [room_for_drafts(rows, few_bits=True) for rows in (1, 4, 8)] == [7, 1, 0]


def test_drafts_rest_where_few_hold_and_are_tried_again() -> None:
    pacing = Pacing()
    for _ in range(DRAFTS):
        assert pacing.awake
        pacing.learn(2, 3, 1)
    assert not pacing.awake
    tokens = 0
    while not pacing.awake:
        pacing.learn(1, 0, 0)
        tokens += 1
    assert tokens == 256
    for _ in range(3 * DRAFTS):
        pacing.learn(3, 3, 2)
        assert pacing.awake
    pacing.limit = 0
    assert not pacing.awake
