"""Sequences of an engine, each with an adapter of its own."""

from typing import Any

import pytest
import torch

import quintet
from conformance.families import Family, each
from pefts import ATTENTION
from quintet.errors import InputError
from quintet.generation.engine import Engine

TEXT = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [5, 6, 7, 8])


def with_two(family: Family) -> Any:
    model = family.model_of(tie_word_embeddings=False)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        targets = [*ATTENTION[family.name], "embed_tokens", "lm_head"]
        config = quintet.LoraConfig(target_modules=targets, init_lora_weights=False, lora_alpha=32)
        model.add_adapter(config, name)
    return model.eval()


@each
def test_each_sequence_is_as_alone(family: Family) -> None:
    model = with_two(family)
    names = ("a", "__base__", "b", None)
    engine = Engine(model, rows=3, capacity=16)
    sequences = [
        engine.sequence(prompt, adapter_name=name, **TEXT)
        for prompt, name in zip(PROMPTS, names, strict=True)
    ]
    waiting = list(sequences)
    while waiting or engine.sequences:
        while waiting and len(engine.sequences) < 3:
            engine.add(waiting.pop(0))
        engine.step(engine.sequences)
        for sequence in engine.sequences:
            if sequence.finished:
                engine.remove(sequence)
    for prompt, name, sequence in zip(PROMPTS, names, sequences, strict=True):
        # None is what the model uses.
        model.set_adapter("b" if name is None else [] if name == "__base__" else name)
        alone = model.generate(torch.tensor([prompt]), **TEXT)
        assert alone[0].tolist() == sequence.ids


@each
def test_what_a_row_holds_is_of_its_adapter(family: Family) -> None:
    model = with_two(family)
    engine = Engine(model, rows=2, capacity=16)
    first = engine.sequence(PROMPTS[1], adapter_name="a", **TEXT)
    engine.add(first)
    engine.step([first])
    held = engine.extract(first)
    same = engine.sequence([*PROMPTS[1], 3], adapter_name="a", **TEXT)
    engine.add(same, held)
    engine.step([first, same])
    engine.remove(same)
    other = engine.sequence([*PROMPTS[1], 3], adapter_name="b", **TEXT)
    engine.add(other, held)
    with pytest.raises(InputError, match="other adapters"):
        engine.step([other])
    with pytest.raises(InputError, match="no adapter 'c'"):
        engine.sequence(PROMPTS[0], adapter_name="c", **TEXT)
