"""`None` in a call lifts what a config sets, in a config it is "not set", as in Transformers."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import transformers

from conformance.families import FAMILIES
from quintet import GenerationConfig, pipeline
from quintet.errors import InputError
from quintet.generation.plan import configured

# For every option of both libraries, two values: of the checkpoint, and of the call.
VALUES: dict[str, tuple[Any, Any]] = {
    "max_length": (60, 50),
    "max_new_tokens": (6, 7),
    "min_length": (5, 6),
    "min_new_tokens": (2, 3),
    "early_stopping": (True, "never"),
    "max_time": (50.0, 60.0),
    "stop_strings": ("ab", ["cd"]),
    "do_sample": (True, False),
    "num_beams": (2, 3),
    "use_mtp": (True, False),
    "use_cache": (False, True),
    "cache_implementation": ("static", "dynamic"),
    "max_cache_len": (40, 60),
    "temperature": (0.3, 1.5),
    "top_k": (2, 7),
    "top_p": (0.4, 0.9),
    "min_p": (0.2, 0.1),
    "top_h": (0.5, 0.6),
    "typical_p": (0.4, 0.6),
    "epsilon_cutoff": (0.01, 0.02),
    "eta_cutoff": (0.01, 0.02),
    "repetition_penalty": (1.3, 0.8),
    "encoder_repetition_penalty": (1.3, 0.8),
    "length_penalty": (0.5, 2.0),
    "no_repeat_ngram_size": (2, 3),
    "encoder_no_repeat_ngram_size": (2, 3),
    "bad_words_ids": ([[7]], [[8, 9]]),
    "renormalize_logits": (True, False),
    "forced_bos_token_id": (4, 5),
    "forced_eos_token_id": (4, 5),
    "remove_invalid_values": (True, False),
    "exponential_decay_length_penalty": ([2, 1.5], [3, 1.1]),
    "suppress_tokens": ([4], [5, 6]),
    "begin_suppress_tokens": ([4], [5, 6]),
    "sequence_bias": ([[[4], 2.0]], [[[5], 1.0]]),
    "token_healing": (True, False),
    "guidance_scale": (1.5, 2.0),
    "num_return_sequences": (1, 1),
    "output_attentions": (True, False),
    "output_hidden_states": (True, False),
    "output_scores": (True, False),
    "output_logits": (True, False),
    "return_dict_in_generate": (True, False),
    "pad_token_id": (3, 4),
    "bos_token_id": (3, 4),
    "eos_token_id": ([3, 5], 4),
    "num_assistant_tokens": (3, 4),
    "num_assistant_tokens_schedule": ("heuristic", "constant"),
    "assistant_confidence_threshold": (0.2, 0.3),
    "prompt_lookup_num_tokens": (2, 3),
    "max_matching_ngram_size": (1, 3),
    "prefill_chunk_size": (4, 5),
    "disable_compile": (True, False),
}
# Of one library alone, or objects that are of different classes.
NOT_COMPARED = {
    "cache_config",
    "cache_dtype",
    "compile",
    "compile_config",
    "frequency_penalty",
    "presence_penalty",
    "watermarking_config",
}
# What the others say is not counted here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_option_is_compared_or_named() -> None:
    names = {f.name for f in dataclasses.fields(GenerationConfig)} - {"other", "read_as"}
    assert names == set(VALUES) | NOT_COMPARED


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    return FAMILIES[0].twins("ForCausalLM", {}, "eager")


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("given", ["nothing", "none", "value", "config"])
def test_what_holds_is_what_holds_there(name: str, given: str, twins: tuple[Any, Any]) -> None:
    ours, theirs = twins
    stored, asked = VALUES[name]
    kept = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, name: stored}
    ours.generation_config = GenerationConfig(**kept)
    theirs.generation_config = transformers.GenerationConfig(**kept)
    call: dict[str, Any] = {"none": {name: None}, "value": {name: asked}}.get(given, {})
    config = {name: asked} if given == "config" else {"temperature": None}
    own = configured(ours.generation_config, GenerationConfig(**config), call)
    other, _ = theirs._prepare_generation_config(transformers.GenerationConfig(**config), **call)
    usual = theirs.generation_config._get_default_generation_params()
    for option in VALUES:
        mine, its = getattr(own, option), getattr(other, option)
        if given == "value" and name == "max_length" and option == "max_new_tokens":
            continue
        assert mine == its or (mine is None and its == usual.get(option)), option
        if call == {option: None}:
            assert mine is None


OFF: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("eos_token_id", {"eos_token_id": list(range(99))}, {}),
    ("top_k", {"do_sample": True, "top_k": 1}, {"top_k": 0}),
    ("temperature", {"do_sample": True, "temperature": 0.01}, {"temperature": 1.0}),
    ("top_p", {"do_sample": True, "top_p": 0.01}, {"top_p": 1.0}),
    ("min_p", {"do_sample": True, "min_p": 0.99}, {"min_p": 0.0}),
    ("do_sample", {"do_sample": True}, {"do_sample": False}),
    ("repetition_penalty", {"repetition_penalty": 9.0}, {"repetition_penalty": 1.0}),
    ("suppress_tokens", {"suppress_tokens": list(range(40))}, {"suppress_tokens": []}),
    ("bad_words_ids", {"bad_words_ids": [[i] for i in range(40)]}, {}),
    ("sequence_bias", {"sequence_bias": [[[7], 99.0]]}, {}),
    ("forced_eos_token_id", {"forced_eos_token_id": 7}, {}),
    ("num_beams", {"num_beams": 4}, {"num_beams": 1}),
    ("max_new_tokens", {"max_new_tokens": 2}, {"max_new_tokens": 20}),
]


@pytest.mark.parametrize(("name", "stored", "off"), OFF, ids=[name for name, _, _ in OFF])
def test_the_text_is_that_without_the_option(
    name: str, stored: dict[str, Any], off: dict[str, Any]
) -> None:
    model = FAMILIES[0].model_of()
    base = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
    prompt = torch.tensor([[5, 6, 7], [8, 9, 5]])

    def run(config: dict[str, Any], **call: Any) -> list[list[int]]:
        model.generation_config = GenerationConfig(**{**base, **config})
        torch.manual_seed(0)
        made: list[list[int]] = model.generate(prompt, **call).tolist()
        return made

    lifted = run(stored, **{name: None})
    assert lifted == run({**stored, name: None, **off})
    assert lifted != run(stored)
    # In an object, it is "not set", and what the checkpoint says holds.
    assert run(stored, generation_config=GenerationConfig(**{name: None})) == run(stored)


def test_a_misspelt_option_is_none_either() -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(InputError, match="did you mean 'top_k'"):
        model.generate(torch.tensor([[5]]), topk=None)


def test_a_pipeline_lifts_too() -> None:
    pipe: Any = pipeline("text-generation")
    eos = list(range(len(pipe.tokenizer)))
    pipe.model.generation_config = GenerationConfig(eos_token_id=eos, max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short, long = (
            pipe("def f", do_sample=False, return_tensors=True, **more)[0]["generated_token_ids"]
            for more in ({}, {"eos_token_id": None})
        )
    assert len(long) == len(short) + 4
