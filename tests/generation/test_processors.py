"""What is drawn: the distribution of Transformers' processors, repeatable with a seed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from quintet import GenerationConfig
from quintet.errors import InputError
from quintet.generation import processors
from quintet.generation.processors.assemble import Setting, assemble
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from support import twins

PROMPT = torch.tensor([[5, 17, 3, 5, 8]])
DRAWS = 6_000
OPTIONS = [
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.6},
    {"top_k": 3},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "min_p": 0.3},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    {"top_k": 5, "repetition_penalty": 1.8, "temperature": 0.9},
    {"top_k": 0, "typical_p": 0.6},
    {"top_k": 20, "epsilon_cutoff": 0.04},
    {"top_k": 20, "eta_cutoff": 0.3, "temperature": 1.2},
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return twins("Qwen2ForCausalLM", {"vocab_size": 23, "initializer_range": 0.1})[0]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(logits: Tensor, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the probabilities (V,) Transformers would draw from."""
    makers = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
        "typical_p": theirs.TypicalLogitsWarper,
        "epsilon_cutoff": theirs.EpsilonLogitsWarper,
        "eta_cutoff": theirs.EtaLogitsWarper,
    }
    # In this order, and top_k=0 is none.
    steps = LogitsProcessorList(
        [make(options[name]) for name, make in makers.items() if options.get(name)]
    )
    return steps(ids, logits)[0].softmax(dim=-1)


def surprise(counts: Tensor, probabilities: Tensor) -> float:
    """Return how many standard deviations chi-square is above its mean."""
    assert not counts[probabilities == 0].any()
    expected = probabilities * counts.sum()
    likely = expected >= 5
    freedom = int(likely.sum()) - 1
    chi = float(((counts - expected) ** 2 / expected)[likely].sum())
    return (chi - freedom) / max(2 * freedom, 1) ** 0.5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_transformers_distribution(model: Any, options: dict[str, Any]) -> None:
    logits = model(PROMPT).logits[:, -1].detach()
    probabilities = reference(logits, PROMPT, options)
    out = model.generate(
        PROMPT,
        do_sample=True,
        max_new_tokens=1,
        num_return_sequences=DRAWS,
        generator=seeded(),
        **options,
    )
    counts = out[:, -1].bincount(minlength=23).float()
    assert surprise(counts, probabilities) < 4
    # The options have an effect that a wrong one would not have.
    moved = (logits[0].softmax(dim=-1) - probabilities).abs().sum()
    assert moved > 0.1 or options == {"top_k": 0}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_seeded_generator_makes_it_repeatable(model: Any, options: dict[str, Any]) -> None:
    def draw(seed: int) -> list[int]:
        out: Tensor = model.generate(
            PROMPT, do_sample=True, max_new_tokens=40, generator=seeded(seed), **options
        )
        return out[0].tolist()

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert draw(3) == first
    assert draw(4) != first


def test_without_a_generator_torchs_own_seed_counts(model: Any) -> None:
    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        out: Tensor = model.generate(PROMPT, do_sample=True, max_new_tokens=40)
        return out[0].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_returned_sequences_of_a_prompt_are_side_by_side_and_differ(model: Any) -> None:
    ids = torch.tensor([[0, 4, 5], [7, 8, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=20,
        generator=seeded(),
    )
    assert out.shape == (6, 23)
    assert torch.equal(out[:, :3], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in out[:3]}) == 3


def test_top_k_of_one_is_greedy(model: Any) -> None:
    sampled = model.generate(PROMPT, do_sample=True, top_k=1, generator=seeded())
    assert torch.equal(sampled, model.generate(PROMPT))


def test_a_generator_of_another_device_is_refused(model: Any) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("meta")  # type: ignore[assignment]

    with pytest.raises(InputError, match=r"generator is on meta and the model on cpu"):
        model.generate(PROMPT, do_sample=True, generator=Elsewhere())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_distribution_is_computed_in_full_precision(dtype: torch.dtype) -> None:
    # In halves, the shares of 256 unlikely tokens would not sum to what they are.
    logits = torch.zeros(1, 257, dtype=dtype)
    logits[0, 0] = 5.75
    rows = logits.expand(4000, -1)
    text = TokenBuffer(torch.zeros(4000, 1, dtype=torch.long))
    config = GenerationConfig(do_sample=True, top_k=0, top_p=0.8)

    def sampler() -> Sampler:
        setting = Setting(prompt=text, max_new_tokens=1, vocab_size=257)
        return Sampler(assemble(config, setting), do_sample=True, generators=[seeded()] * 4000)

    drawn = sampler().choose(text, rows)
    assert torch.equal(drawn, sampler().choose(text, rows.float()))
    assert drawn.unique().numel() > 1


def test_the_models_logits_are_not_changed(model: Any) -> None:
    logits = torch.randn(2, 23)
    before = logits.clone()
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        min_new_tokens=4,
        eos_token_id=3,
    )
    text = TokenBuffer(torch.tensor([[1, 2], [3, 4]]))
    processors = assemble(config, Setting(prompt=text, max_new_tokens=5, vocab_size=23))
    Sampler(processors, do_sample=True).choose(text, logits)
    assert torch.equal(logits, before)


# -- rows and their neighbours -----------------------------------------------------------------

LEFT = torch.tensor([[0, 0, 5, 17, 3], [7, 8, 9, 4, 2], [0, 3, 3, 1, 4]])
KEPT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one", "each"])
def test_a_row_does_not_depend_on_its_neighbours(
    model: Any, options: dict[str, Any], several: bool
) -> None:
    options = {**options, "do_sample": True, "max_new_tokens": 12, "eos_token_id": 6}

    def generator(rows: list[int]) -> Any:
        return [seeded(row) for row in rows] if several else seeded()

    together = model.generate(LEFT, attention_mask=KEPT, generator=generator([0, 1, 2]), **options)
    # One generator gives the n-th row the same, however many there are behind it.
    for rows in ([0], [0, 1]) if not several else ([0], [2], [2, 0]):
        out = model.generate(
            LEFT[rows], attention_mask=KEPT[rows], generator=generator(rows), **options
        )
        for place, row in enumerate(rows):
            made, expected = out[place, 5:].tolist(), together[row, 5:].tolist()
            length = min(len(made), len(expected))
            assert made[:length] == expected[:length]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"sequence_bias": [[[0, 0, 4], 9.0], [[3, 1], 3.0]]},
        {"bad_words_ids": [[3, 1], [9]]},
        {"min_new_tokens": 8},
        {"forced_eos_token_id": 9},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"begin_suppress_tokens": list(range(12))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_padding_is_no_text(model: Any, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 10, "eos_token_id": [6, 11], "pad_token_id": 22, **options}
    together = model.generate(LEFT, attention_mask=KEPT, **options)[:, 5:].tolist()
    for row, mask in zip(range(3), KEPT.bool(), strict=True):
        alone = model.generate(LEFT[row][mask][None], **options)[0, int(mask.sum()) :].tolist()
        assert together[row][: len(alone)] == alone


def test_every_option_reaches_the_text(model: Any) -> None:
    """An option that nothing listened to would leave the text as it is."""
    usual = {"max_new_tokens": 12, "eos_token_id": 6, "pad_token_id": 22}
    greedy = model.generate(PROMPT, **usual).tolist()
    free = greedy[0][5:]
    changing: list[dict[str, Any]] = [
        {"repetition_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"encoder_repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[free[0]]]},
        {"sequence_bias": {(free[0],): -30.0}},
        {"suppress_tokens": [free[0]]},
        {"begin_suppress_tokens": [free[0]]},
        {"forced_eos_token_id": 13},
        {"guidance_scale": 3.0},
        {"watermarking_config": {"bias": 9.0}},
        {"prefix_allowed_tokens_fn": lambda row, ids: [1, 2, 3]},
        {"logits_processor": [lambda ids, scores: -scores]},
        {"eos_token_id": free[2]},
        {"eos_token_id": free[2], "min_length": 30, "max_new_tokens": 40},
        {"exponential_decay_length_penalty": (1, 30.0)},
    ]
    for options in changing:
        made = model.generate(PROMPT, **{**usual, **options}).tolist()
        assert made != greedy, options
    assert model.generate(PROMPT[:, :1], forced_bos_token_id=3, **usual)[0, 1] == 3


def test_a_processor_of_the_callers_takes_the_place_of_the_configs(model: Any) -> None:
    from quintet import RepetitionPenaltyLogitsProcessor

    own = [RepetitionPenaltyLogitsProcessor(3.0)]
    made = model.generate(PROMPT, repetition_penalty=1.1, logits_processor=own)
    assert torch.equal(made, model.generate(PROMPT, repetition_penalty=3.0))
    assert not torch.equal(made, model.generate(PROMPT, repetition_penalty=1.1))


@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan"), float("inf"), "1", True])
@pytest.mark.parametrize(
    "made",
    [
        processors.TemperatureLogitsWarper,
        processors.RepetitionPenaltyLogitsProcessor,
        processors.PresencePenaltyLogitsProcessor,
        processors.FrequencyPenaltyLogitsProcessor,
        lambda factor: processors.ExponentialDecayLengthPenalty((1, factor), 3, 2),
    ],
)
def test_what_is_no_number_is_named(made: Callable[[Any], object], number: Any) -> None:
    with pytest.raises(InputError, match="has to be a finite number"):
        made(number)
