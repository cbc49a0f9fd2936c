"""Rows of one choice have options of their own, and each gets what it gets alone."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from quintet import GenerationConfig
from quintet.errors import InputError
from quintet.generation.choosing import Choosing
from quintet.generation.processors.assemble import Setting, assemble
from quintet.generation.processors.base import LogitsProcessor, LogitsWarper
from quintet.generation.processors.warpers import TemperatureLogitsWarper, kind, of_rows, stack
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import NothingLeftError

# Each size is another way through top-k and top-p.
SIZES = (30, 97, 9000)
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.5, 0.9, 1.7],
    "top_k": [0, 1, 5, 20],
    "top_p": [0.3, 0.9, 0.95],
    "min_p": [0.05, 0.2],
    "top_h": [0.3, 0.8],
    "typical_p": [0.4, 0.9],
    "epsilon_cutoff": [0.001, 0.01],
    "eta_cutoff": [0.002, 0.02],
    "repetition_penalty": [0.7, 1.4],
    "presence_penalty": [0.8],
    "no_repeat_ngram_size": [1, 2],
    "bad_words_ids": [[[7], [8, 9]], [[1]]],
    "sequence_bias": [[[[6], 4.0]]],
    "suppress_tokens": [[3, 4]],
    "min_new_tokens": [3],
    "renormalize_logits": [True],
    "watermarking_config": [{"bias": 4.0}],
}
# What has a number for each row.
WARPS = {
    "temperature": (0.5, 0.9, 1.7, 1.0001),
    "top_k": (3, 1, 20, 500_000),
    "top_p": (0.3, 0.9, 0.95, 1.0),
    "min_p": (0.05, 0.2, 0.0, 1.0),
    "top_h": (0.3, 0.8, 1.0, 0.01),
    "typical_p": (0.4, 0.9, 0.2, 0.99),
    "epsilon_cutoff": (0.001, 0.01, 0.3, 0.05),
    "eta_cutoff": (0.002, 0.02, 0.3, 0.1),
}


def sampler_of(
    options: dict[str, Any], prompt: TokenBuffer, V: int, seed: int, own: Any = ()
) -> Sampler:
    config = GenerationConfig(eos_token_id=5, **options)
    made = assemble(config, Setting(prompt=prompt, max_new_tokens=9, vocab_size=V), own)
    generator = torch.Generator().manual_seed(seed)
    return Sampler(made, do_sample=bool(config.do_sample), generators=[generator])


def texts_of(count: int, dice: random.Random) -> list[TokenBuffer]:
    return [TokenBuffer(torch.randint(0, 12, (1, dice.randint(1, 8)))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
def test_each_row_gets_what_it_gets_alone(seed: int) -> None:
    dice, V = random.Random(seed), SIZES[seed % 3]
    torch.manual_seed(seed)
    texts = texts_of(dice.randint(1, 9), dice)
    options = []
    for _ in texts:
        names = dice.sample(sorted(CHOICES), dice.randint(0, 4))
        given = {name: dice.choice(CHOICES[name]) for name in names}
        options.append({"do_sample": dice.random() < 0.7, **given})
    # Some rows ask the same, for which more is done at once.
    options[-1] = options[0]
    for warp in ("temperature", "top_k"):
        if warp in options[0]:
            options[-1] = {**options[0], warp: dice.choice(CHOICES[warp])}
    made = [
        [sampler_of(options[row], text, V, row) for row, text in enumerate(texts)] for _ in range(2)
    ]
    choosing = Choosing(made[0])
    for step in range(1, 4):
        logits = dice.choice((1, 4)) * torch.randn(len(texts), V)
        logits[dice.randrange(len(texts))] = 0.25
        before = logits.clone()
        together = choosing.choose(texts.__getitem__, logits, [step] * len(texts)).read()
        assert torch.equal(logits, before)
        for row, (text, sampler) in enumerate(zip(texts, made[1], strict=True)):
            alone = int(sampler.choose(text, logits[row : row + 1], step=step))
            assert together[row] == alone, (row, options[row])
            text.append(torch.tensor([alone]))


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("name", WARPS)
def test_numbers_of_rows_warp_each_as_its_own(name: str, V: int) -> None:
    torch.manual_seed(V)
    scores = 3 * torch.randn(4, V)
    scores[2] = scores[2].round()
    warpers = []
    for value in WARPS[name]:
        config = GenerationConfig(do_sample=True, **{"top_k": 0, name: value})
        made = assemble(
            config,
            Setting(prompt=TokenBuffer(torch.ones(1, 1).long()), max_new_tokens=1, vocab_size=V),
        )
        # Some values ask for nothing.
        warpers.append(made[0] if made else type(warpers[0])(value))
    assert len({kind(one) for one in warpers}) == 1
    several = stack(warpers)
    together = several.warp(scores)
    for row, one in enumerate(warpers):
        assert torch.equal(together[row : row + 1], one.warp(scores[row : row + 1]))
    some = torch.tensor([3, 1, 1])
    assert torch.equal(of_rows(several, some).warp(scores[some]), together[some])
    assert stack([warpers[1]] * 3) is warpers[1]


def test_several_positions_keep_the_numbers_of_their_rows() -> None:
    from quintet.generation.choice import TokenChoice

    torch.manual_seed(0)
    text = TokenBuffer(torch.ones(1, 1).long())
    options = [{"temperature": t, "top_k": 7, "top_p": p} for t, p in ((0.5, 0.9), (2.0, 0.4))]
    choices = [sampler_of({"do_sample": True, **one}, text, 90, 0).choice for one in options]
    scores = torch.randn(2, 3, 90)
    # In one row, more tie with the seventh than are looked at first.
    scores[1, 1] = 0.0
    together = TokenChoice.stack(choices).warped_positions(scores)
    for row, choice in enumerate(choices):
        alone = choice.warped_positions(scores[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


class Failing(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ValueError("of its own")


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_row_that_fails_leaves_the_others_what_they_get(do_sample: bool, top_k: int) -> None:
    torch.manual_seed(1)
    V, dice = 60, random.Random(0)
    texts, options = texts_of(6, dice), {"do_sample": do_sample, "top_k": top_k}
    logits = torch.randn(6, V)
    logits[1], logits[3], logits[4, 7] = -math.inf, math.nan, math.inf
    own = {2: [Failing()]}
    made = [
        [sampler_of(options, text, V, row, own.get(row, ())) for row, text in enumerate(texts)]
        for _ in range(2)
    ]
    choosing = Choosing(made[0])
    found = choosing.choose(texts.__getitem__, logits, [8] * 6).read()
    for row in (1, 3, 4):
        assert isinstance(found[row], NothingLeftError)
        assert "for new token 8" in str(found[row])
    assert "forbidden" in str(found[1])
    assert "NaN" in str(found[3])
    assert isinstance(found[2], ValueError)
    # And none of the others drew a number more than once.
    again = torch.randn(6, V)
    more = choosing.choose(texts.__getitem__, again, [9] * 6).read()
    for row in (0, 5):
        for place, (tokens, scores) in enumerate(((found, logits), (more, again))):
            alone = made[1][row].choose(texts[row], scores[row : row + 1])
            assert tokens[row] == int(alone), place


def test_a_warper_of_the_callers_serves_the_rows_that_have_it() -> None:
    class Halving(LogitsWarper):
        def warp(self, scores: Tensor) -> Tensor:
            seen.append(len(scores))
            return scores / 2

    class Hotter(TemperatureLogitsWarper):
        def warp(self, scores: Tensor) -> Tensor:
            assert isinstance(self.temperature, float)
            return super().warp(scores)

    seen: list[int] = []
    shared = Halving()
    warpers: list[Any] = [[shared], [Hotter(2.0)], [shared], [Hotter(3.0)], []]
    samplers = [Sampler(type(Sampler().processors)(one)) for one in warpers]
    texts = texts_of(5, random.Random(0))
    logits = torch.randn(5, 40)
    assert (
        Choosing(samplers).choose(texts.__getitem__, logits, [1] * 5).read()
        == logits.argmax(dim=-1).tolist()
    )
    assert seen == [2]


def test_a_sampler_of_several_rows_is_refused() -> None:
    several = Sampler(do_sample=True, generators=[torch.Generator(), torch.Generator()])
    with pytest.raises(InputError, match="sampler of row 1 has 2 generators"):
        Choosing([Sampler(), several])
