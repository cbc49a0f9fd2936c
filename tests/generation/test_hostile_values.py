"""Whatever an option or argument is given, what comes out is a text or an error that names it."""

import contextlib
import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES
from quintet import AutoTokenizer, DynamicCache, GenerationConfig, demo_model
from quintet.errors import InputError, QuintetError
from quintet.generation.processors import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

NAN, INF = float("nan"), float("inf")
HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    10**9,
    10**30,
    -(10**30),
    10**400,
    NAN,
    INF,
    -INF,
    1e308,
    0.5,
    "",
    "x",
    b"x",
    [],
    [[]],
    [None],
    [True],
    [1.5],
    [-1],
    [10**9],
    [10**30],
    ["a"],
    [[1, 2], [3]],
    [[1], []],
    {},
    {"a": 1},
    {1: 2},
    {(1,): NAN},
    (1, 2),
    np.int64(3),
    np.float32(0.5),
    np.array([1, 2]),
    torch.tensor(3),
    torch.tensor([1, 2]),
    torch.tensor(NAN),
    object(),
    set(),
    range(3),
    [[[4], NAN]],
    [[[4], INF]],
    [5, 5],
    complex(1, 1),
    [0, NAN],
    [10**9, 1.1],
    lambda *given: None,
]
OPTIONS = [
    f.name for f in dataclasses.fields(GenerationConfig) if f.name not in ("other", "read_as")
]
ARGUMENTS = [
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "tokenizer",
    "assistant_model",
    "assistant_tokenizer",
    "streamer",
    "generator",
    "logits_to_keep",
]
BESIDE: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"num_beams": 2},
    {"prompt_lookup_num_tokens": 2},
]
PROMPT = torch.tensor([[5, 6, 7, 8]])
BASE: dict[str, Any] = {"max_new_tokens": 2, "eos_token_id": 3, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES[0].model_of()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "compile"] + ARGUMENTS)
def test_a_text_or_an_error_of_ours(name: str, model: Any, tokenizer: Any) -> None:
    dice = random.Random(name)
    for value in dice.sample(HOSTILE, 16):
        call = {**BASE, **dice.choice(BESIDE), name: value}
        if name in ("stop_strings", "token_healing"):
            call["tokenizer"] = tokenizer
        if name.startswith("negative"):
            call = {"guidance_scale": 1.5, "negative_prompt_ids": PROMPT, **call}
        if name not in ("inputs", "input_ids", "inputs_embeds"):
            call["inputs"] = PROMPT
        with contextlib.suppress(QuintetError):
            assert model.generate(**call) is not None
        if name in OPTIONS:
            with contextlib.suppress(QuintetError):
                GenerationConfig(**{name: value}).to_json_string()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"suppress_tokens": [5000]}, "suppress_tokens names token 5000, .* 0 to 100"),
    ({"begin_suppress_tokens": [5000]}, "begin_suppress_tokens names token 5000"),
    ({"forced_bos_token_id": 5000}, "forced_bos_token_id names token 5000"),
    ({"forced_eos_token_id": [1, 5000]}, "forced_eos_token_id names token 5000"),
    ({"bad_words_ids": [[1], [5000, 2]]}, "bad_words_ids names token 5000"),
    ({"sequence_bias": {(5000,): 1.0}}, "sequence_bias names token 5000"),
    ({"sequence_bias": {(5,): NAN}}, r"gives \[5\] the bias nan"),
    ({"sequence_bias": {(5,): INF}}, r"gives \[5\] the bias inf"),
    ({"sequence_bias": [[[5], 1.0], [[5], 2.0]]}, r"gives \[5\] two biases, 1.0 and 2.0"),
    ({"num_beams": 10**9}, "num_beams=1000000000 has to be .* at most 10000"),
    ({"num_return_sequences": 10**9}, "num_return_sequences=1000000000 has to be"),
    (
        {"max_cache_len": 10**9, "cache_implementation": "static"},
        "max_cache_len=1000000000 is more than the model's context",
    ),
    ({"prefix_allowed_tokens_fn": lambda row, ids: [5000]}, "names token 5000"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: None}, "has to be token ids"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: ["a"]}, "has to be token ids"),
    ({"prefix_allowed_tokens_fn": 3}, "prefix_allowed_tokens_fn is a int"),
    ({"attention_mask": torch.tensor([[1, 1, NAN, 1]])}, "attention_mask holds nan"),
    ({"attention_mask": torch.tensor([[0.0, 0.0, -INF, 0.0]])}, "attention_mask holds -inf"),
    ({"attention_mask": torch.ones(1, 4, device="meta")}, "attention_mask is on the meta device"),
    ({"inputs": PROMPT.to("meta")}, "input_ids is on the meta device"),
    ({"position_ids": torch.tensor([[0, 1]])}, r"position_ids has shape \(1, 2\)"),
    ({"position_ids": torch.tensor([[0, 1, -2, 3]])}, "position_ids holds -2"),
    ({"position_ids": torch.arange(4)[None], "use_cache": False}, "position_ids needs a cache"),
    ({"negative_prompt_ids": torch.tensor([[5000]]), "guidance_scale": 2.0}, "negative_prompt_ids"),
    ({"streamer": "stdout"}, "streamer is a str; it has to be a streamer"),
    ({"tokenizer": "qwen"}, "tokenizer is a str; it has to be a tokenizer"),
    ({"assistant_model": "qwen"}, "assistant_model is a str; it has to be a model"),
    ({"logits_processor": [3]}, "logits_processor is a list; it has to be a list of functions"),
    ({"watermarking_config": {"bias": NAN}}, "bias=nan has to be"),
    ({"watermarking_config": {"hashing_key": 2**70}}, "hashing_key=.* has to be"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_the_error_names_value_and_rule(given: dict[str, Any], told: str, model: Any) -> None:
    with pytest.raises(InputError, match=told):
        model.generate(**{"inputs": PROMPT, **BASE, **given})


@pytest.mark.parametrize("value", [NAN, INF])
def test_embeddings_that_are_no_numbers(value: float, model: Any) -> None:
    embeds = model.get_input_embeddings()(PROMPT).detach().clone()
    embeds[0, 2, 3] = value
    with pytest.raises(InputError, match=r"inputs_embeds\[0, 2\] holds NaN or infinity"):
        model.generate(inputs_embeds=embeds, **BASE)


def test_a_cache_of_another_library_is_named_by_its_module(model: Any) -> None:
    import transformers

    with pytest.raises(InputError, match=r"transformers.*DynamicCache; it has to be a Cache"):
        model.generate(PROMPT, past_key_values=transformers.DynamicCache(), **BASE)
    assert model.generate(PROMPT, past_key_values=DynamicCache(model.config), **BASE).shape[0] == 1


def test_the_power_of_a_length_is_a_number(model: Any) -> None:
    options = {**BASE, "num_beams": 2, "max_new_tokens": 6}
    for penalty in (30, -30, 30.0):
        assert model.generate(PROMPT, length_penalty=penalty, **options).shape[0] == 1
    for penalty in (31, 300, 5000, 1000.0, 10**9, -1e29):
        with pytest.raises(InputError, match=r"length_penalty=.* at least -30 and at most 30"):
            model.generate(PROMPT, length_penalty=penalty, **options)


def test_what_is_named_twice_counts_once(model: Any, tokenizer: Any) -> None:
    decay = {"exponential_decay_length_penalty": [0, 3.0]}
    scores, ids = torch.randn(1, 9), torch.ones(1, 5, dtype=torch.long)
    once, twice = (
        ExponentialDecayLengthPenalty([0, 3.0], ends, 2)(ids, scores) for ends in ([4], [4, 4])
    )
    assert torch.equal(once, twice)
    for one, other in (
        ({"eos_token_id": 5, **decay}, {"eos_token_id": [5, 5], **decay}),
        ({"eos_token_id": 5, "num_beams": 3}, {"eos_token_id": [5, 5, 5], "num_beams": 3}),
        ({"bad_words_ids": [[9]]}, {"bad_words_ids": [[9], [9]]}),
        ({"suppress_tokens": [9]}, {"suppress_tokens": [9, 9]}),
        ({"begin_suppress_tokens": [9]}, {"begin_suppress_tokens": [9, 9]}),
        ({"sequence_bias": [[[9], 3.0]]}, {"sequence_bias": [[[9], 3.0], [[9], 3.0]]}),
        ({"forced_eos_token_id": 9}, {"forced_eos_token_id": [9, 9]}),
        (
            {"stop_strings": "a", "tokenizer": tokenizer},
            {"stop_strings": ["a", "a"], "tokenizer": tokenizer},
        ),
    ):
        first, second = (
            model.generate(PROMPT, **{**BASE, "max_new_tokens": 9, **call}) for call in (one, other)
        )
        assert torch.equal(first, second), other


def test_processors_by_themselves_name_the_token_too() -> None:
    scores, ids = torch.randn(1, 9), torch.ones(1, 1, dtype=torch.long)
    for processor, name in (
        (SuppressTokensLogitsProcessor([9]), "suppress_tokens"),
        (ForcedBOSTokenLogitsProcessor(9), "forced_bos_token_id"),
        (ForcedEOSTokenLogitsProcessor(2, 9), "forced_eos_token_id"),
    ):
        with pytest.raises(InputError, match=f"{name} names token 9"):
            processor(ids, scores)


def test_minus_one_ends_nothing(model: Any) -> None:
    free = model.generate(PROMPT, **{**BASE, "eos_token_id": None})
    made: Tensor = model.generate(PROMPT, **{**BASE, "eos_token_id": -1})
    assert torch.equal(made, free)
