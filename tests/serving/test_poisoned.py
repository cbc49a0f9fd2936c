"""What a row held is nothing to those that follow: its memory is poisoned when it is given back."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conformance.families import WIDE, Family, each
from generation.sequences import prompt_of
from quintet.cache import PooledCache
from quintet.serving import Engine, Limits

PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fill rows that are given back with what is no number, and count them."""
    free, count = PooledCache.free, [0]

    def poisoning(self: PooledCache, row: int) -> None:
        free(self, row)
        index = len(self.rows)
        for slot in (*self._memories.tokens, *self._memories.states):
            for buffer in slot._buffers.whole:  # type: ignore[attr-defined]
                buffer[index] = torch.nan if buffer.is_floating_point() else 255
        count[0] += 1

    monkeypatch.setattr(PooledCache, "free", poisoning)
    yield count
    assert count[0] > 8


@each
@pytest.mark.parametrize("nbits", [None, 8])
def test_nobody_has_anything_of_who_was_there_before(
    family: Family, nbits: int | None, poisoned: list[int]
) -> None:
    """Rows come, are cancelled, give their memory back and go on; each has what it has alone."""
    model = family.model_of(max_position_embeddings=256, **WIDE[family.name])
    few = {} if nbits is None else {"cache_implementation": "quantized", "cache_dtype": "int8"}
    dice = random.Random(2)
    prompts = [
        torch.cat((prompt_of(80, row % 2), prompt_of(dice.randint(1, 60), row)), dim=1)
        for row in range(9)
    ]
    leaves = [row for row in range(9) if row % 3 == 2]

    async def ask(engine: Engine, row: int) -> list[int]:
        made: list[int] = []
        options: dict[str, Any] = {"max_new_tokens": 5 + row, "scope": "ab"[row % 2], **PLAIN}
        if row % 4 == 1:
            options["speculate"] = "lookup"
        answers = engine.generate(prompts[row], **options)
        async for answer in answers:
            made += answer.ids
            if row in leaves and len(made) >= 2:
                break
        await answers.aclose()
        return made

    async def everybody(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(ask(engine, row) for row in range(9)))

    limits = Limits(rows=3, capacity=200, piece=64, patience=0.0, kept=60_000)
    with Engine(model, limits=limits, nbits=nbits) as engine:
        answers = asyncio.run(everybody(engine))
        assert engine.healthy
        assert engine.state.failed == {}
    for row, made in enumerate(answers):
        alone = model.generate(prompts[row], max_new_tokens=5 + row, **few, **PLAIN)
        alone = alone[0, prompts[row].shape[1] :].tolist()
        assert made == alone[: len(made)]
        assert len(made) >= 2 if row in leaves else made == alone
