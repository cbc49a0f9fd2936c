"""A step whose shapes are fixed is compiled once, can be recorded, and makes the same tokens."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from conformance.families import FAMILIES, Family, each
from generation.sequences import prompt_of
from quintet import CompileConfig
from quintet.cache import RowContent
from quintet.generation import fixed_step
from quintet.generation.compiling import compiled
from quintet.generation.engine import Engine
from quintet.generation.fetching import Fetched
from quintet.generation.fixed_step import Recording
from quintet.generation.graphs import WARM_UP, CudaGraphs
from quintet.generation.sequence import Sequence
from simulated_gpu import Again, Replayed, SimulatedGPU, moved

PLAIN: dict[str, Any] = {"eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
# One token in five is an end.
ENDING = {**PLAIN, "eos_token_id": list(range(5, 101, 5))}


def alone(model: Any, prompt: Tensor, new: int, **options: Any) -> list[int]:
    made: Tensor = model.generate(prompt, max_new_tokens=new, **(options or PLAIN))
    return made[0, prompt.shape[1] :].tolist()


@each
def test_the_step_is_one_graph_that_is_compiled_once(family: Family) -> None:
    torch._dynamo.reset()
    model, counter = family.model_of(**family.shallow), CompileCounter()
    config = CompileConfig(backend=counter, fullgraph=True)
    engine = Engine(model, 3, 100, recording=Recording(compile=lambda one: compiled(one, config)))
    prompts = [prompt_of(length, length) for length in (5, 9, 14)]
    sequences = [engine.sequence(one, max_new_tokens=65, **PLAIN) for one in prompts]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sequence in sequences:
            engine.add(sequence)
            engine.step([sequence])
        while not all(one.finished for one in sequences):
            engine.step(sequences)
    assert counter.frame_count == 1
    # A token of the prompt, and 64 steps.
    assert [one.new for one in sequences] == [alone(model, one, 65) for one in prompts]


def test_a_step_in_bfloat16_is_one_graph() -> None:
    """Kernels for CPUs are found by files and compilers, which no program holds."""
    torch._dynamo.reset()
    family = next(one for one in FAMILIES if one.name == "deepseek-v2")
    model, counter = family.model_of(**family.shallow).bfloat16(), CompileCounter()
    config = CompileConfig(backend=counter, fullgraph=True)
    engine = Engine(model, 1, 100, recording=Recording(compile=lambda one: compiled(one, config)))
    sequence = engine.sequence(prompt_of(9, 9), max_new_tokens=3, **PLAIN)
    engine.add(sequence)
    engine.step([sequence])
    while not sequence.finished:
        engine.step([sequence])
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [PLAIN, ENDING], ids=["to-the-end", "ending"])
@each
def test_sequences_that_come_and_go_become_what_each_becomes_alone(
    family: Family, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows wait, leave and come while others step; numbers of rows and slots are exceeded."""
    monkeypatch.setattr(fixed_step, "SLOTS", 8)
    model, graphs, dice = family.model_of(**family.shallow), Again(), random.Random(2)
    engine = Engine(model, 5, 60, recording=Recording(graphs))
    made = [(prompt_of(length, length), 30 - length) for length in (1, 20, 3, 9, 14, 2, 7, 5)]
    sequences = [engine.sequence(one, max_new_tokens=new, **options) for one, new in made]
    # Those that wait, with what their rows held.
    waiting: list[tuple[Sequence, list[RowContent]]] = [(one, []) for one in sequences]
    left = 0
    while waiting or engine.sequences:
        while waiting and len(engine.sequences) < 5 and dice.random() < 0.7:
            one, held = waiting.pop(0)
            engine.add(one, *held)
        there = engine.sequences
        if there:
            engine.step(dice.sample(there, dice.randint(1, len(there))), 4)
        for one in there:
            if one.finished:
                assert engine.length(one) >= len(one.ids) - 1
                engine.remove(one)
            elif left < 4 and len(one.new) == 4 + left:
                waiting.append((one, [engine.extract(one)] if left % 2 else []))
                engine.remove(one)
                left += 1
    assert [one.new for one in sequences] == [alone(model, *one, **options) for one in made]
    assert graphs.replayed > 2 * graphs.captured > 0


@each
def test_what_a_sequence_held_that_ended_is_gone_on_with(family: Family) -> None:
    model = family.model_of(**family.shallow)
    engine = Engine(model, 2, 60, recording=Recording(Again()))
    prompt = prompt_of(5, 5)
    # The fourth token that it makes is its end.
    options = {**PLAIN, "eos_token_id": alone(model, prompt, 4)[-1]}
    one = engine.sequence(prompt, max_new_tokens=20, **options)
    engine.add(one)
    while not one.finished:
        engine.step([one])
    assert one.new == alone(model, prompt, 20, **options)
    if len(one.new) > 2:
        # The step that began before it was known to have ended ran over its last token.
        assert engine.length(one) == len(one.ids)
    more = torch.tensor([[*one.ids, 7, 8]])
    other = engine.sequence(more, max_new_tokens=5, **PLAIN)
    engine.add(other, engine.extract(one))
    engine.remove(one)
    assert other.computed >= len(one.ids) - 1
    while not other.finished:
        engine.step([other])
    assert other.new == alone(model, more, 5)


@each
def test_a_row_without_a_token_ends_alone(family: Family) -> None:
    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.tensor(ids.shape[1] == 8), -torch.inf, scores)

    model = family.model_of(**family.shallow)
    engine = Engine(model, 2, 40, recording=Recording(Again()))
    prompts = [prompt_of(n, n) for n in (4, 7)]
    bad = engine.sequence(prompts[0], max_new_tokens=8, logits_processor=[forbid], **PLAIN)
    good = engine.sequence(prompts[1], max_new_tokens=8, **PLAIN)
    for one in (bad, good):
        engine.add(one)
    while not good.finished:
        engine.step([bad, good])
    assert "no token to take for new token 5" in str(bad.error)
    assert bad.new == alone(model, prompts[0], 4)
    assert good.new == alone(model, prompts[1], 8)


@each
def test_reading_that_is_interrupted_loses_nothing(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reads, read = family.model_of(**family.shallow), [0], Fetched.read
    engine = Engine(model, 2, 40, recording=Recording(Again()))
    expected = run_all(engine)

    def interrupts(self: Fetched) -> Any:
        reads[0] += 1
        if reads[0] in (3, 5):
            raise KeyboardInterrupt
        return read(self)

    sequences = [engine.sequence(prompt_of(n, n), max_new_tokens=8, **PLAIN) for n in (4, 7)]
    for one in sequences:
        engine.add(one)
    monkeypatch.setattr(Fetched, "read", interrupts)
    while not all(one.finished for one in sequences):
        with suppress(KeyboardInterrupt):
            engine.step(sequences)
    assert reads[0] > 8
    assert [one.new for one in sequences] == expected


@each
def test_what_a_device_recorded_makes_the_same_tokens(family: Family) -> None:
    expected = [
        alone(family.model_of(**family.shallow), prompt_of(length, length), 12)
        for length in (5, 9, 14)
    ]
    graphs = Replayed()
    with SimulatedGPU():
        model = moved(family.model_of(**family.shallow))
        engine = Engine(model, 3, 64, recording=Recording(graphs))
        prompts = [prompt_of(length, length)[0].tolist() for length in (5, 9, 14)]
        sequences = [engine.sequence(one, max_new_tokens=12, **PLAIN) for one in prompts]
        for sequence in sequences:
            engine.add(sequence)
            engine.step(engine.sequences)
        while not all(one.finished for one in sequences):
            engine.step(sequences)
    assert [one.new for one in sequences] == expected
    assert graphs.replays >= 10


def run_all(engine: Engine, new: int = 8) -> list[list[int]]:
    sequences = [engine.sequence(prompt_of(n, n), max_new_tokens=new, **PLAIN) for n in (4, 7)]
    for one in sequences:
        engine.add(one)
    while not all(one.finished for one in sequences):
        engine.step(sequences)
    for one in sequences:
        engine.remove(one)
    return [one.new for one in sequences]


def test_rows_in_few_bits_are_stepped_alike() -> None:
    model, graphs = FAMILIES[0].model_of(head_dim=16), Again()
    expected = run_all(Engine(model, 2, 40, nbits=8))
    assert run_all(Engine(model, 2, 40, nbits=8, recording=Recording(graphs))) == expected
    assert graphs.replayed


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    class Refuses:
        def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            function()
            raise RuntimeError("operation not permitted when stream is capturing")

    for family in FAMILIES:
        model = family.model_of(**family.shallow)
        with pytest.warns(UserWarning, match="cannot be recorded on cpu.*not permitted"):
            made = run_all(Engine(model, 2, 40, recording=Recording(Refuses())))
        assert made == run_all(Engine(model, 2, 40))


def test_a_model_that_was_changed_is_recorded_anew() -> None:
    model, graphs = FAMILIES[0].model_of(), Again()
    engine = Engine(model, 2, 40, recording=Recording(graphs))
    run_all(engine)
    run_all(engine)
    assert graphs.captured == 1
    for part in model.parameters():
        part.data = 1.5 * part.data
    assert run_all(engine) == run_all(Engine(model, 2, 40))
    assert graphs.captured == 2
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    run_all(engine)
    assert graphs.captured == 3
    handle.remove()
    # What has a forward of its own, as adapters have, may have another at any time.
    model.model.norm.forward = model.model.norm.forward
    before = graphs.replayed
    run_all(engine)
    assert graphs.replayed == before


@each
def test_a_step_that_fails_can_be_done_again(
    family: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = family.model_of(**family.shallow)
    engine = Engine(model, 2, 40, recording=Recording(Again()))
    expected, head, calls = run_all(engine), type(model.lm_head).forward, [0]

    def fails(self: Any, x: Tensor) -> Tensor:
        calls[0] += self is model.lm_head
        # One that began ahead of its turn, and the same when it is its turn.
        if self is model.lm_head and calls[0] in (6, 7):
            raise MemoryError
        return head(self, x)

    sequences = [engine.sequence(prompt_of(n, n), max_new_tokens=8, **PLAIN) for n in (4, 7)]
    for one in sequences:
        engine.add(one)
    monkeypatch.setattr(type(model.lm_head), "forward", fails)
    engine.step(sequences)
    failed = 0
    while not all(one.finished for one in sequences):
        try:
            engine.step(sequences)
        except MemoryError:
            failed += 1
    assert failed == 1
    assert "began ahead failed, and is done in its turn: MemoryError()" in caplog.text
    assert [one.new for one in sequences] == expected


def test_a_cuda_graph_is_recorded_after_runs_that_do_not_count() -> None:
    """What is asked of torch.cuda, in its order; whether a GPU does it is seen on one."""
    asked, runs = mock.MagicMock(), [0]

    def function() -> Tensor:
        runs[0] += 1
        asked.ran()
        return torch.full((2,), float(runs[0]))

    names = (
        "graph_pool_handle",
        "device",
        "Stream",
        "current_stream",
        "stream",
        "CUDAGraph",
        "graph",
    )
    with mock.patch.multiple(torch.cuda, **{name: getattr(asked, name) for name in names}):
        replay = CudaGraphs(torch.device("cuda", 1)).capture(function)
        made = replay()
        assert replay() is made
    assert made.tolist() == [3.0, 3.0]
    told = [name for name, _, _ in asked.mock_calls]
    recording = told.index("graph().__enter__")
    assert told[:recording].count("ran") == WARM_UP
    assert told[recording : told.index("graph().__exit__")].count("ran") == 1
    assert told.count("CUDAGraph().replay") == 2
    assert asked.device.call_args_list == [mock.call(torch.device("cuda", 1))] * 3
    assert asked.graph.call_args.kwargs["pool"] is asked.graph_pool_handle()
