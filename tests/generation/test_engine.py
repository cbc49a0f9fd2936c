"""Sequences that come and go between any two steps become what each becomes alone."""

import random
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, WIDE, Family, each
from quintet.cache import DynamicCache, RowContent
from quintet.errors import ContextLengthError, InputError
from quintet.generation.engine import Engine
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.sequence import Sequence
from quintet.kernels.native import available
from quintet.ops.sampling import NothingLeftError

ENDS = {"eos_token_id": 5, "pad_token_id": 0}
SCHEDULES = 8
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


def prompt_of(length: int, seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(6, 90, (1, length), generator=dice)


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


class Broken(LogitsProcessor):
    """Fails at the third token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("of its own")
        return scores


class Reader:
    """A streamer that keeps what it gets, and may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.got: list[list[int]] = []
        self.ended = 0
        self.fails_at = fails_at

    def put(self, value: Tensor) -> None:
        if len(self.got) == self.fails_at:
            raise BrokenPipeError("nobody reads")
        self.got.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def run(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        engine.step(sequences)


@each
def test_what_goes_wrong_with_one_is_the_affair_of_that_one(family: Family) -> None:
    model = family.model_of()
    engine = Engine(model, 6, 32)
    options = {**ENDS, "max_new_tokens": 6, "min_new_tokens": 6}
    readers = [Reader(), Reader(fails_at=4)]

    def fails(ids: Tensor, scores: object) -> bool:
        if ids.shape[1] == 9:
            raise KeyError("no such rule")
        return False

    sequences = [
        engine.sequence(
            prompt_of(5, 0), logits_processor=[Broken()], streamer=readers[0], **options
        ),
        engine.sequence(prompt_of(6, 1), **options),
        engine.sequence(prompt_of(5, 2), streamer=readers[1], **options),
        engine.sequence(prompt_of(7, 3), stopping_criteria=[fails], **options),
        engine.sequence(
            prompt_of(5, 5), logits_processor=[lambda ids, scores: scores[:, :4]], **options
        ),
        engine.sequence(
            prompt_of(3, 4), suppress_tokens=list(range(model.config.vocab_size)), **options
        ),
    ]
    run(engine, sequences)
    kinds = [RuntimeError, None, BrokenPipeError, KeyError, InputError, NothingLeftError]
    assert [one.finish_reason for one in sequences] == [
        "error",
        "length",
        "error",
        "error",
        "error",
        "error",
    ]
    for one, kind in zip(sequences, kinds, strict=True):
        assert isinstance(one.error, kind) if kind else one.error is None
    assert [len(one.new) for one in sequences] == [2, 6, 4, 2, 0, 0]
    assert sequences[1].new == model.generate(prompt_of(6, 1), **options)[0, 6:].tolist()
    assert [reader.ended for reader in readers] == [1, 1]
    assert readers[0].got == [prompt_of(5, 0)[0].tolist(), *([token] for token in sequences[0].new)]


@each
@pytest.mark.parametrize("where", ["prompt", "step"])
def test_a_forward_that_fails_can_be_done_again(
    family: Family, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.model_of()
    engine = Engine(model, 3, 32)
    options = {**ENDS, "max_new_tokens": 5, "min_new_tokens": 5}
    prompts = [prompt_of(n, n) for n in (4, 9, 6)]
    sequences = [engine.sequence(prompt, **options) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    if where == "step":
        engine.step(sequences)
    held = [list(sequence.ids) for sequence in sequences]
    layer = model.base_model.layers[-1]

    def fail(module: Any, args: Any) -> None:
        raise MemoryError("out of it")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        engine.step(sequences[:2])
    handle.remove()
    assert [sequence.ids for sequence in sequences] == held
    while not all(sequence.finished for sequence in sequences):
        engine.step(sequences)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.new == model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def test_what_is_no_affair_of_one_sequence_is_refused_by_its_name() -> None:
    engine = Engine(FAMILIES[0].model_of(), 1, 32)
    for name, value in {
        "num_beams": 2,
        "use_cache": False,
        "use_mtp": True,
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "prefill_chunk_size": 4,
    }.items():
        with pytest.raises(InputError, match=f"{name}=.*no option of one sequence"):
            engine.sequence([7, 8], **{name: value})
    with pytest.raises(InputError, match="2 rows; a sequence is one text"):
        engine.sequence(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="empty"):
        engine.sequence([])
    with pytest.raises(InputError, match="temprature"):
        engine.sequence([7], temprature=2.0)


def test_rows_are_given_once_and_only_where_there_are_any() -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(InputError, match="rows=0"):
        Engine(model, 0, 32)
    engine = Engine(model, 1, 10)
    one, other = (engine.sequence([7, 8, 9], max_new_tokens=4, **ENDS) for _ in range(2))
    with pytest.raises(InputError, match="not in this engine"):
        engine.step([one])
    engine.add(one)
    with pytest.raises(InputError, match="already"):
        engine.add(one)
    with pytest.raises(InputError, match="rows are taken"):
        engine.add(other)
    with pytest.raises(InputError, match="once"):
        engine.step([one, one])
    with pytest.raises(ContextLengthError, match="row of 10"):
        engine.add(engine.sequence([7] * 8, max_new_tokens=4, **ENDS))
    one.cancel()
    assert one.finished
    assert engine.step([one]) == [[]]
    assert one.finish_reason == "cancelled"
    engine.remove(one)
    with pytest.raises(InputError, match="has ended"):
        engine.add(one)
    engine.add(other)
    assert engine.sequences == [other]


def test_a_reader_is_told_once_when_its_sequence_is_cancelled_elsewhere() -> None:
    engine = Engine(FAMILIES[0].model_of(), 2, 32)
    for steps in (0, 2):
        for leaves in (True, False):
            reader = Reader()
            one = engine.sequence(prompt_of(5, 0), streamer=reader, max_new_tokens=9, **ENDS)
            engine.add(one)
            for _ in range(steps):
                engine.step([one])
            thread = threading.Thread(target=one.cancel)
            thread.start()
            thread.join()
            assert one.finished
            assert reader.ended == 0
            if not leaves:
                assert engine.step([one]) == [[]]
            engine.remove(one)
            assert (reader.ended, one.finish_reason, len(one.new)) == (1, "cancelled", steps)


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
