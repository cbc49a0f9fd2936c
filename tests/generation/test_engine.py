"""Sequences that come and go between any two steps become what each becomes alone."""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, WIDE, Family, each
from generation.sequences import ENDS, prompt_of, run
from quintet.cache import DynamicCache, RowContent
from quintet.errors import InputError
from quintet.generation.engine import Engine
from quintet.generation.sequence import Sequence
from quintet.kernels.native import available

SCHEDULES = int(os.environ.get("QUINTET_SCHEDULES", "8"))
CHOICES: dict[str, list[Any]] = {
    "temperature": [0.5, 1.7],
    "top_k": [0, 3, 20],
    "top_p": [0.3, 0.9],
    "min_p": [0.05],
    "typical_p": [0.9],
    "repetition_penalty": [1.4],
    "frequency_penalty": [1.1],
    "no_repeat_ngram_size": [2],
    "bad_words_ids": [[[7], [8, 9]]],
    "sequence_bias": [[[[6], 4.0]]],
    "begin_suppress_tokens": [[10, 12]],
    "min_new_tokens": [3],
    "forced_eos_token_id": [19],
    "watermarking_config": [{"bias": 4.0}],
}


def drawn_options(dice: random.Random) -> dict[str, Any]:
    names = dice.sample(sorted(CHOICES), dice.randint(0, 4))
    options = {name: dice.choice(CHOICES[name]) for name in names}
    if dice.random() < 0.3 and "watermarking_config" not in options:
        options["prompt_lookup_num_tokens"] = dice.choice((1, 3))
    return {"do_sample": dice.random() < 0.6, "max_new_tokens": dice.randint(3, 9), **options}


@dataclass(eq=False)
class Case:
    """One sequence of a schedule and what it becomes alone."""

    prompt: Tensor
    options: dict[str, Any]
    seed: int
    sequence: Sequence = field(init=False)
    kept: tuple[RowContent, ...] = ()

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def alone(self, model: Any) -> list[int]:
        made = model.generate(self.prompt, generator=self.generator(), **ENDS, **self.options)
        return made[0, self.prompt.shape[1] :].tolist()


def cases(engine: Engine, dice: random.Random, count: int) -> list[Case]:
    made = []
    for _ in range(count):
        seed = dice.randrange(10**6)
        case = Case(prompt_of(dice.choice((1, 2, 5, 11, 24)), seed), drawn_options(dice), seed)
        case.sequence = engine.sequence(
            case.prompt, generator=case.generator(), **ENDS, **case.options
        )
        made.append(case)
    return made


@each
@pytest.mark.parametrize("seed", range(SCHEDULES))
@pytest.mark.filterwarnings("ignore:.*has no effect without:UserWarning")
def test_any_schedule(family: Family, seed: int) -> None:
    """Some wait, some leave halfway and come again, with what their row held or without it."""
    model, dice = family.model_of(), random.Random(seed)
    rows = dice.randint(1, 4)
    engine = Engine(model, rows, 64)
    waiting = cases(engine, dice, dice.randint(rows, 7))
    everyone = list(waiting)
    under_way: list[Case] = []
    for _ in range(1000):
        while waiting and len(under_way) < rows:
            under_way.append(waiting.pop(0))
            engine.add(under_way[-1].sequence, *under_way[-1].kept)
        if not under_way:
            break
        some = dice.sample(under_way, dice.randint(1, len(under_way)))
        lengths = [len(case.sequence.ids) for case in some]
        got = engine.step([case.sequence for case in some], dice.choice((None, 1, 3, 8)))
        for case, length, tokens in zip(some, lengths, got, strict=True):
            assert case.sequence.ids[length:] == tokens
        leaving = [case for case in under_way if case.sequence.finished]
        if dice.random() < 0.15:
            leaving = leaving or [dice.choice(under_way)]
        for case in leaving:
            case.kept = ()
            if dice.random() < 0.5:
                case.kept = (engine.extract(case.sequence),)
            engine.remove(case.sequence)
            under_way.remove(case)
            if not case.sequence.finished:
                waiting.append(case)
    assert not engine.sequences
    for case in everyone:
        assert case.sequence.new == case.alone(model), case.options


@each
def test_rows_are_used_again(family: Family) -> None:
    model = family.model_of()
    engine = Engine(model, 1, 32)
    for seed in range(3):
        prompt = prompt_of(4 + 5 * seed, seed)
        sequence = engine.sequence(prompt, max_new_tokens=4, **ENDS)
        engine.add(sequence)
        while not sequence.finished:
            engine.step([sequence], 3)
        engine.remove(sequence)
        expected = model.generate(prompt, max_new_tokens=4, **ENDS)[0, prompt.shape[1] :]
        assert sequence.new == expected.tolist()


@each
@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_drafts_for_sequences_of_its_own(family: Family, do_sample: bool) -> None:
    model, assistant = family.model_of(), family.model_of()
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    plain: dict[str, Any] = {"eos_token_id": -1, "do_sample": do_sample, "max_new_tokens": 12}
    drafts = {**plain, "assistant_model": assistant, "num_assistant_tokens": 3}
    engine = Engine(model, 3, 40)
    prompts = [prompt_of(n, n) for n in (4, 11, 6)]
    asked = [
        {**options, "generator": torch.Generator().manual_seed(row)}
        for row, options in enumerate((drafts, plain, drafts))
    ]
    sequences = [
        engine.sequence(prompt, **options) for prompt, options in zip(prompts, asked, strict=True)
    ]
    run(engine, sequences)
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        asked[row]["generator"].manual_seed(row)
        expected = model.generate(prompt, **asked[row])
        assert sequence.new == expected[0, prompt.shape[1] :].tolist()
        assert row == 1 or sequence.drafting.found.drafted_tokens > 0


@each
@pytest.mark.parametrize("nbits", [8, 4])
def test_rows_of_few_bits_hold_what_such_a_cache_does(family: Family, nbits: int) -> None:
    model = family.model_of(**WIDE[family.name])
    options: dict[str, Any] = {"eos_token_id": -1, "max_new_tokens": 6, "do_sample": False}
    engine = Engine(model, 3, 40, nbits=nbits)
    prompts = [prompt_of(n, n) for n in (4, 11, 6)]
    sequences = [engine.sequence(prompt, **options) for prompt in prompts]
    run(engine, sequences)
    few = {"cache_implementation": "quantized", "cache_dtype": f"int{nbits}"}
    for prompt, sequence in zip(prompts, sequences, strict=True):
        expected = model.generate(prompt, **few, **options)
        assert sequence.new == expected[0, prompt.shape[1] :].tolist()


@each
def test_what_begins_alike_is_read_once(family: Family) -> None:
    model = family.model_of()
    engine = Engine(model, 3, 32)
    options = {**ENDS, "max_new_tokens": 5, "min_new_tokens": 5}
    prompt, behind = prompt_of(9, 0), [prompt_of(n, n) for n in (1, 4)]
    first = engine.sequence(prompt, **options)
    engine.add(first)
    engine.step([first])
    shared = engine.extract(first)
    with pytest.raises(InputError, match="9 tokens and the sequence has 9"):
        engine.add(engine.sequence(prompt, **options), shared)
    texts = [torch.cat((prompt, more), dim=1) for more in behind]
    others = [engine.sequence(text, **options) for text in texts]
    for other in others:
        engine.add(other, shared)
    assert [other.waiting for other in others] == [1, 4]
    while not all(one.finished for one in engine.sequences):
        engine.step(engine.sequences)
    for text, one in zip((prompt, *texts), (first, *others), strict=True):
        assert one.new == model.generate(text, **options)[0, text.shape[1] :].tolist()


def test_two_engines_and_generate_share_a_model() -> None:
    model = FAMILIES[0].model_of()
    engines = [Engine(model, 2, 32) for _ in range(2)]
    prompts = [prompt_of(n, n) for n in (4, 9)]
    sequences = [
        engine.sequence(prompt, max_new_tokens=5, **ENDS)
        for engine, prompt in zip(engines, prompts, strict=True)
    ]
    before = {name: id(value) for name, value in vars(model).items()}
    for engine, sequence in zip(engines, sequences, strict=True):
        engine.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        for engine, sequence in zip(engines, sequences, strict=True):
            engine.step([sequence])
        model.generate(prompts[0], max_new_tokens=1, **ENDS)
    assert {name: id(value) for name, value in vars(model).items()} == before
    for prompt, sequence in zip(prompts, sequences, strict=True):
        expected = model.generate(prompt, max_new_tokens=5, **ENDS)[0, prompt.shape[1] :]
        assert sequence.new == expected.tolist()


@each
@pytest.mark.skipif(not available(), reason="there are no kernels on this machine")
def test_in_bfloat16_a_token_does_not_depend_on_company(family: Family) -> None:
    """On the kernels, where prompts pass in steps of their own and single tokens in any mix."""
    model = family.model_of(**WIDE[family.name]).to(torch.bfloat16)
    options = {**ENDS, "do_sample": True, "top_k": 0, "max_new_tokens": 9, "min_new_tokens": 9}
    for seed in range(4):
        dice = random.Random(seed)
        prompts = [prompt_of(dice.choice((3, 9, 40, 70)), 10 * seed + n) for n in range(4)]

        def sequence(engine: Engine, row: int, prompts: list[Tensor] = prompts) -> Sequence:
            generator = torch.Generator().manual_seed(row)
            return engine.sequence(prompts[row], generator=generator, **options)

        expected = []
        for row in range(4):
            engine = Engine(model, 1, 80)
            single = sequence(engine, row)
            run(engine, [single])
            expected.append(single.new)
        engine = Engine(model, 4, 80)
        waiting = [sequence(engine, row) for row in range(4)]
        everyone = list(waiting)
        while not all(one.finished for one in everyone):
            if waiting and dice.random() < 0.5:
                engine.add(waiting[-1])
                engine.step([waiting.pop()])
            going = [one for one in engine.sequences if not one.finished]
            engine.step(dice.sample(going, dice.randint(0, len(going))))
        assert [one.new for one in everyone] == expected


@each
def test_what_is_done_to_a_model_is_seen_from_the_next_step_on(family: Family) -> None:
    """An engine holds what it took down of the layers, and looks whether it still holds."""
    model = family.model_of(**WIDE[family.name])
    prompt = prompt_of(6, 0)
    engine = Engine(model, 2, 32)
    sequence = engine.sequence(prompt, max_new_tokens=8, eos_token_id=-1, do_sample=False)
    engine.add(sequence)
    seen: list[int] = []
    layer = model.base_model.layers[0]
    cache, ids, expected = DynamicCache(model.config), prompt, []
    for step in range(8):
        if step == 3:
            with torch.no_grad():
                for weight in layer.parameters():
                    weight.mul_(-1.5)
        handle = None
        if step == 5:
            handle = layer.register_forward_hook(lambda *given: seen.append(len(seen)))
        engine.step([sequence])
        if handle is not None:
            handle.remove()
            assert seen == [0]
        with torch.no_grad():
            expected.append(int(model(ids, past_key_values=cache).logits[0, -1].argmax()))
        ids = torch.tensor([expected[-1:]])
    assert sequence.new == expected
