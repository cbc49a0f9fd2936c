"""What goes wrong with a sequence or a step, and what an engine refuses."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from generation.sequences import ENDS, prompt_of, run
from quintet.errors import ContextLengthError, InputError
from quintet.generation.engine import Engine
from quintet.generation.processors.base import LogitsProcessor
from quintet.ops.sampling import NothingLeftError


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


@each
@pytest.mark.parametrize("drafts", [False, True])
def test_a_step_that_is_interrupted_can_be_done_again(family: Family, drafts: bool) -> None:
    model = family.model_of()
    engine = Engine(model, 2, 40)
    options: dict[str, Any] = {"eos_token_id": -1, "max_new_tokens": 8, "do_sample": False}
    if drafts:
        options["prompt_lookup_num_tokens"] = 2
    calls: list[int] = []

    def interrupts(ids: Tensor, scores: object) -> bool:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return False

    prompts = [prompt_of(n, n).repeat(1, 2) for n in (4, 3)]
    sequences = [engine.sequence(prompts[0], stopping_criteria=[interrupts], **options)]
    sequences.append(engine.sequence(prompts[1], **options))
    with pytest.raises(KeyboardInterrupt):
        run(engine, sequences)
    while not all(sequence.finished for sequence in sequences):
        engine.step(sequences)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.new == model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


@each
def test_an_assistant_that_fails_ends_its_sequence(family: Family) -> None:
    model, assistant = family.model_of(), family.model_of()
    engine = Engine(model, 2, 40)
    options = {"eos_token_id": -1, "max_new_tokens": 6, "do_sample": False}
    drafted = engine.sequence(prompt_of(4, 0), assistant_model=assistant, **options)
    plain = engine.sequence(prompt_of(5, 1), **options)
    for sequence in (drafted, plain):
        engine.add(sequence)
    engine.step([drafted, plain])

    def fail(module: Any, args: Any) -> None:
        raise ValueError("of the assistant's")

    assistant.base_model.register_forward_pre_hook(fail)
    while not plain.finished:
        engine.step(engine.sequences)
    assert drafted.finish_reason == "error"
    assert isinstance(drafted.error, ValueError)
    assert plain.new == model.generate(prompt_of(5, 1), **options)[0, 5:].tolist()


def test_what_is_no_affair_of_one_sequence_is_refused_by_its_name() -> None:
    engine = Engine(FAMILIES[0].model_of(), 1, 32)
    for name, value in {
        "num_beams": 2,
        "use_cache": False,
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
