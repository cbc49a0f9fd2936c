"""Where a logit becomes a token: short ways are the long one, and several positions are one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quintet import GenerationConfig
from quintet.errors import InputError
from quintet.generation.processors.assemble import Setting, assemble
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.sampler import Sampler, row_generators
from quintet.generation.token_buffer import TokenBuffer

V = 97
CPU = torch.device("cpu")
OPTIONS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 5},
    {"top_k": 20, "temperature": 0.7, "top_p": 0.8},
    {"top_k": 20, "typical_p": 0.6, "min_p": 0.02},
    {"top_k": 60, "eta_cutoff": 0.01, "epsilon_cutoff": 0.01, "renormalize_logits": True},
    {"top_k": 90, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def made(text: TokenBuffer, options: dict[str, Any], own: Any = (), **further: Any) -> Sampler:
    config = GenerationConfig(do_sample=True, **options)
    prompt = TokenBuffer(text.ids[:, :4].clone(), text.padding)
    processors = assemble(config, Setting(prompt=prompt, max_new_tokens=20, vocab_size=V), own)
    return Sampler(processors, do_sample=True, **further)


def text(B: int = 3, T: int = 9) -> TokenBuffer:
    return TokenBuffer(torch.randint(0, 12, (B, T)), torch.tensor([0, 3, 1])[:B])


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@each_option
def test_the_short_way_draws_what_the_long_one_does(options: dict[str, Any]) -> None:
    rows = text(1).ids.expand(4000, -1)
    many = TokenBuffer(rows.contiguous())
    logits = 2 * torch.randn(1, V)
    sampler = made(many, options)
    torch.manual_seed(3)
    counts = torch.bincount(sampler.choose(many, logits.expand(4000, -1)), minlength=V)
    expected = sampler.scores(many, logits.expand(4000, -1))[0].softmax(dim=-1) * 4000
    assert not counts[expected == 0].any()
    likely = expected >= 5
    chi = float(((counts - expected) ** 2 / expected)[likely].sum())
    freedom = int(likely.sum()) - 1
    assert chi < freedom + 4 * (2 * max(freedom, 1)) ** 0.5


@each_option
def test_several_positions_are_those_one_by_one(options: dict[str, Any]) -> None:
    rows, logits = text(), torch.randn(3, 4, V)
    sampler = made(rows, options)
    together = sampler.log_probabilities(rows, logits)
    for place in range(4):
        prefix = rows.cut(len(rows) - 3 + place)
        alone = sampler.scores(prefix, logits[:, place]).log_softmax(dim=-1)
        # Behind a top-k, sums run over fewer numbers: the last digit of a logarithm may differ.
        torch.testing.assert_close(together[:, place], alone, rtol=0, atol=2e-6)


def test_rows_of_different_lengths_are_as_alone() -> None:
    """What speculation does: each row accepts as many tokens as it likes."""
    options = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "frequency_penalty": 0.4,
        "min_new_tokens": 6,
        "eos_token_id": 5,
        "top_k": 0,
        "sequence_bias": [[[1, 2], 3.0], [[4], -1.0]],
        "exponential_decay_length_penalty": (1, 1.4),
        "forced_eos_token_id": 7,
        "encoder_repetition_penalty": 1.2,
    }
    prompts = torch.randint(0, 12, (3, 6))
    padding = torch.tensor([0, 4, 2])
    drafts, counts = torch.randint(0, 12, (3, 3)), torch.tensor([3, 1, 2])
    rows = TokenBuffer(prompts.clone(), padding)
    config = GenerationConfig(do_sample=True, **options)
    setting = Setting(prompt=TokenBuffer(prompts, padding), max_new_tokens=2, vocab_size=V)
    logits = torch.randn(3, V)
    rows.accept([draft[:n] for draft, n in zip(drafts.tolist(), counts.tolist(), strict=True)])
    assert rows.lengths().tolist() == [9, 3, 6]
    together = Sampler(assemble(config, setting), do_sample=True).scores(rows, logits)
    for row in range(3):
        prompt = prompts[row : row + 1, padding[row] :]
        one = TokenBuffer(torch.cat((prompt, drafts[row : row + 1, : counts[row]]), dim=1))
        single = Setting(prompt=TokenBuffer(prompt), max_new_tokens=2, vocab_size=V)
        alone = Sampler(assemble(config, single), do_sample=True).scores(one, logits[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_accepting_moves_rows_to_the_right() -> None:
    rows = TokenBuffer(torch.tensor([[1, 2], [0, 3]]), torch.tensor([0, 1]))
    rows.accept([[4, 5], [6]])
    assert rows.ids[0].tolist() == [1, 2, 4, 5]
    assert rows.ids[1, 2:].tolist() == [3, 6]
    assert rows.mask().tolist() == [[True] * 4, [False, False, True, True]]
    rows.accept([[], [9]])
    assert [row[kept].tolist() for row, kept in zip(rows.ids, rows.mask(), strict=True)] == [
        [1, 2, 4, 5],
        [3, 6, 9],
    ]
    rows.append(torch.tensor([10, 11]))
    assert rows.ids[:, -1].tolist() == [10, 11]
    assert rows.lengths().tolist() == [5, 4]


def test_no_processors_no_work() -> None:
    logits = torch.randn(2, V)
    sampler = Sampler()
    assert sampler.scores(text(2), logits) is logits
    assert sampler.scores_of_last(text(2), logits[:, None]).data_ptr() == logits.data_ptr()
    assert torch.equal(sampler.choose(text(2), logits), logits.argmax(dim=-1))


def test_a_warper_of_the_callers_that_reads_the_text_gets_it() -> None:
    from quintet.generation.processors import TopKLogitsWarper

    class Last(TopKLogitsWarper):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert input_ids.shape[0] == scores.shape[0]
            return torch.full_like(scores, -torch.inf).scatter(1, input_ids[:, -1:], 0.0)

    rows = text()
    sampler = Sampler(do_sample=True, processors=made(rows, {}).processors)
    sampler = Sampler(type(sampler.processors)([Last(3), *sampler.processors]), do_sample=True)
    drawn = sampler.choose(rows, torch.randn(3, V))
    assert drawn.tolist() == rows.ids[:, -1].tolist()
    logs = sampler.log_probabilities(rows, torch.randn(3, 2, V))
    assert logs.argmax(dim=-1).tolist() == rows.ids[:, -2:].tolist()


def test_an_argument_that_nobody_gives_is_named() -> None:
    class Needy(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, beam: int) -> Tensor:  # type: ignore[override]
            return scores

    with pytest.raises(InputError, match="Needy needs the argument 'beam'"):
        made(text(), {}, own=[Needy()]).scores(text(), torch.randn(3, V))


def test_the_old_name_of_an_argument_is_refused_not_left_out() -> None:
    class Older(LogitsProcessor):
        def __call__(
            self, input_ids: Tensor, scores: Tensor, goes_on: Tensor | None = None
        ) -> Tensor:
            return scores

    with pytest.raises(InputError, match=r"Older needs the argument 'goes_on'.*unfinished=…"):
        made(text(), {}, own=[Older()]).scores(text(), torch.randn(3, V))


# -- generators ------------------------------------------------------------------------------


def draws(generators: list[torch.Generator] | None) -> list[float]:
    assert generators is not None
    return [float(torch.rand(1, generator=one)) for one in generators]


def test_one_generator_gives_each_row_its_own_whatever_their_number() -> None:
    def first(rows: int) -> list[float]:
        return draws(row_generators(torch.Generator().manual_seed(3), rows, 1, CPU))

    assert first(5)[:2] == first(2)
    assert len(set(first(5))) == 5
    parent = torch.Generator().manual_seed(3)
    assert draws(row_generators(parent, 2, 1, CPU)) != draws(row_generators(parent, 2, 1, CPU))


def test_a_list_gives_each_prompt_its_own() -> None:
    own = seeded(3)
    assert row_generators(own, 3, 1, CPU) == own
    copies = draws(row_generators(seeded(2), 2, 3, CPU))
    assert len(set(copies)) == 6
    assert draws(row_generators(seeded(1), 1, 3, CPU)) == copies[:3]
    assert row_generators(None, 2, 1, CPU) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [(seeded(2), "2 generators for 3 prompts"), ([3], "holds a int; it has to be a torch.Gen")],
)
def test_other_generators_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        row_generators(given, 3, 1, CPU)
