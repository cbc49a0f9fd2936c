"""A row depends on nothing but itself: alone and in company, it becomes the same text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from quintet.generation.processors import WatermarkLogitsProcessor
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import in_top_p

V, NEW = 90, 6
SEEDS = 20
LENGTHS = (9, 1, 4, 6)
ENDS = {"eos_token_id": 5, "pad_token_id": 0, "max_new_tokens": NEW}
# Of each, a few are drawn for a call.
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.5, 1.7],
    "top_k": [0, 1, 3, 20, 60],
    "top_p": [0.3, 0.9],
    "min_p": [0.05, 0.4],
    "top_h": [0.3, 0.8],
    "typical_p": [0.4, 0.9],
    "epsilon_cutoff": [0.01],
    "eta_cutoff": [0.02],
    "repetition_penalty": [0.7, 1.4],
    "encoder_repetition_penalty": [1.5],
    "presence_penalty": [0.8],
    "frequency_penalty": [1.1],
    "no_repeat_ngram_size": [1, 2, 3],
    "encoder_no_repeat_ngram_size": [1, 2],
    "bad_words_ids": [[[7], [8, 9], [11, 12, 13]]],
    "sequence_bias": [[[[6], 4.0], [[20, 21], -3.0]]],
    "suppress_tokens": [[3, 4, 30]],
    "begin_suppress_tokens": [[10, 12, 14, 16, 18]],
    "min_new_tokens": [3],
    "forced_bos_token_id": [17],
    "forced_eos_token_id": [19],
    "exponential_decay_length_penalty": [[1, 1.5]],
    "renormalize_logits": [True],
    "watermarking_config": [
        {"bias": 4.0},
        {"bias": 4.0, "seeding_scheme": "selfhash", "context_width": 3},
    ],
}


def rows() -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randint(2, V, (1, length)) for length in LENGTHS]


def batch(texts: list[Tensor], *, left: bool) -> dict[str, Tensor]:
    width = max(text.shape[1] for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width)
    for row, text in enumerate(texts):
        n = text.shape[1]
        place = slice(width - n, None) if left else slice(0, n)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def without_filling(made: Tensor, width: int) -> list[int]:
    new = made[width:].tolist()
    return new[: new.index(5) + 1] if 5 in new else new


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in range(count)]


def company(model: Any, order: list[int], *, left: bool = True, **options: Any) -> list[list[int]]:
    """What each row becomes among the others, in that order."""
    texts, own = rows(), seeds(len(LENGTHS))
    inputs = batch([texts[row] for row in order], left=left)
    made = model.generate(**inputs, generator=[own[row] for row in order], **options)
    width = inputs["input_ids"].shape[1]
    found = {row: without_filling(made[place], width) for place, row in enumerate(order)}
    return [found[row] for row in range(len(order))]


def alone(model: Any, **options: Any) -> list[list[int]]:
    own = seeds(len(LENGTHS))
    return [
        without_filling(model.generate(text, generator=[own[row]], **options)[0], text.shape[1])
        for row, text in enumerate(rows())
    ]


def drawn_options(seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    names = dice.sample(sorted(CHOICES), dice.randint(1, 6))
    return {name: dice.choice(CHOICES[name]) for name in names}


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.filterwarnings("ignore:.*has no effect without:UserWarning")
def test_any_options(seed: int) -> None:
    model = FAMILIES[seed % len(FAMILIES)].model_of()
    dice = random.Random(seed)
    options = {**ENDS, "do_sample": seed % 3 != 0, **drawn_options(seed)}
    if seed % 4 == 1 and "watermarking_config" not in options:
        options["prompt_lookup_num_tokens"] = 3
    order = dice.sample(range(len(LENGTHS)), len(LENGTHS))
    made = company(model, order, left=bool(seed % 2), **options)
    assert made == alone(model, **options), options


def only(vocabulary: int, *tokens: int) -> Callable[[int, Tensor], list[int]]:
    """Allow few tokens to row 1, and all of them to the others."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        return list(tokens) if row == 1 else list(range(vocabulary))

    return allowed


@each
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 0, "top_p": 0.7},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_beside_a_row_with_few_tokens(family: Family, options: dict[str, Any]) -> None:
    model = family.model_of()
    tokens = (7,) if "num_beams" in options else (7, 8, 9)
    options = {**ENDS, "do_sample": True, **options}
    made = company(
        model,
        [0, 1, 2, 3],
        prefix_allowed_tokens_fn=only(model.config.vocab_size, *tokens),
        **options,
    )
    plain = company(model, [0, 1, 2, 3], **options)
    assert [made[row] for row in (0, 2, 3)] == [plain[row] for row in (0, 2, 3)]
    assert set(made[1]) <= set(tokens)


def test_beside_a_row_in_which_many_tokens_tie() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 200)
    logits[1] = 0.0
    for warps in ({"top_k": 20}, {"top_k": 0}):
        from quintet.generation.config import GenerationConfig
        from quintet.generation.processors.assemble import Setting, assemble

        text = TokenBuffer(torch.randint(0, 200, (3, 4)))

        def sampler(seed: list[int], text: TokenBuffer = text, warps: Any = warps) -> Sampler:
            config = GenerationConfig(do_sample=True, **warps)
            made = assemble(config, Setting(prompt=text, max_new_tokens=3, vocab_size=200))
            generators = [torch.Generator().manual_seed(one) for one in seed]
            return Sampler(made, do_sample=True, generators=generators)

        for turn in range(0, 60, 3):
            together = sampler([turn, turn + 1, turn + 2])
            one = [
                int(
                    sampler([turn + row]).choose(
                        TokenBuffer(text.ids[row : row + 1]), logits[row][None]
                    )
                )
                for row in range(3)
            ]
            assert together.choose(text, logits).tolist() == one
            positions = sampler([0] * 3).scores_of_last(text, logits[:, None])[:, 0]
            for row in range(3):
                single = sampler([0]).scores_of_last(
                    TokenBuffer(text.ids[row : row + 1]), logits[row][None, None]
                )
                assert torch.equal(positions[row], single[0, 0])


def test_a_large_nucleus_is_that_of_the_row_alone() -> None:
    """One row has its mass in a few tokens, the other spread over more than are looked at first."""
    torch.manual_seed(0)
    logits = torch.cat((6 * torch.randn(2, 20_000), 0.1 * torch.randn(2, 20_000)))
    together = in_top_p(logits, 0.9)
    for row in range(4):
        assert torch.equal(together[row : row + 1], in_top_p(logits[row : row + 1], 0.9))


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_padding_is_not_hashed_into_a_watermark(scheme: str) -> None:
    mark = WatermarkLogitsProcessor(V, "cpu", seeding_scheme=scheme, context_width=3)
    ids, scores = torch.tensor([[8, 4, 6, 9], [0, 0, 6, 9]]), torch.randn(2, V)
    together = mark(ids, scores, padding=torch.tensor([0, 2]))
    assert torch.equal(together[1:], mark(ids[1:, 2:], scores[1:]))


def test_sequences_of_a_prompt_are_those_it_has_alone() -> None:
    model = FAMILIES[0].model_of()
    options = {**ENDS, "do_sample": True, "num_return_sequences": 3, "temperature": 1.5}
    texts, own = rows(), seeds(len(LENGTHS))
    inputs = batch(texts, left=True)
    together = model.generate(**inputs, generator=own, **options)[:, 9:]
    for row, text in enumerate(texts):
        generator = seeds(len(LENGTHS))[row]
        single = model.generate(text, generator=[generator], **options)[:, text.shape[1] :]
        for copy in range(3):
            made = together[3 * row + copy]
            assert without_filling(made, 0) == without_filling(single[copy], 0)


def test_a_function_is_not_asked_about_a_row_at_its_end() -> None:
    model = FAMILIES[0].model_of()
    ended: set[int] = set()

    def ends_row_2(row: int, ids: Tensor) -> list[int]:
        assert row not in ended, "asked behind the end"
        if row == 2:
            ended.add(row)
            return [5]
        return [token for token in range(model.config.vocab_size) if token != 5]

    for options in ({}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
        ended.clear()
        made = company(
            model, [0, 1, 2, 3], prefix_allowed_tokens_fn=ends_row_2, **{**ENDS, **options}
        )
        assert made[2] == [5]
        assert [len(made[row]) for row in (0, 1, 3)] == [NEW] * 3


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_a_function_gets_the_columns_of_the_prompt_and_what_was_added(
    options: dict[str, Any],
) -> None:
    """Also where rows take different numbers of drafted tokens, and lie elsewhere inside."""
    model = FAMILIES[0].model_of()
    texts = rows()
    inputs = batch([text.repeat(1, 2) for text in texts], left=True)
    width = inputs["input_ids"].shape[1]
    seen: dict[int, set[tuple[int, ...]]] = {row: set() for row in range(4)}

    def every(row: int, ids: Tensor) -> list[int]:
        assert torch.equal(ids[:width], inputs["input_ids"][row])
        seen[row].add(tuple(ids[width:].tolist()))
        return list(range(model.config.vocab_size))

    made = model.generate(
        **inputs,
        prompt_lookup_num_tokens=3,
        prefix_allowed_tokens_fn=every,
        generator=seeds(4),
        **{**ENDS, **options},
    )
    for row in range(4):
        new = without_filling(made[row], width)
        assert all(tuple(new[:n]) in seen[row] for n in range(len(new)))
