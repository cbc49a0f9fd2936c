"""On a device, decoding makes the text that it makes on a CPU, and nobody waits for a step."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from generation.sequences import prompt_of
from quintet.errors import InputError
from quintet.generation import fixed_step, recorded
from quintet.generation.engine import Engine
from quintet.generation.fetching import Fetched
from quintet.generation.graphs import Graphs
from simulated_gpu import Again, Replayed, Simulated, SimulatedGPU, moved

IDS = torch.randint(1, 101, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) >= torch.tensor([[0], [4], [2]])).long()
# Whatever a step may end by, and every kind of reading and warping that has numbers of its own; but
# for top-k, whose candidates are drawn in another order on a CPU.
GREEDY: dict[str, Any] = {"attention_mask": MASK, "eos_token_id": [5, 9, 60]}
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": None,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "eos_token_id": 7,
}
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": None, "top_p": 0.9}
# What is asked for inside of `Engine.step`.
ENGINE_STEP = re.compile(r"engine\.py:\d+ step")


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.told.append([])


def generated(
    model: Any, new: int, options: dict[str, Any], gpu: SimulatedGPU | None = None
) -> tuple[Tensor, list[list[int]]]:
    torch.manual_seed(3)
    heard = Heard()

    def there(x: Any) -> Any:
        return Simulated(x) if gpu is not None and isinstance(x, Tensor) else x

    made = model.generate(
        there(IDS),
        max_new_tokens=new,
        pad_token_id=0,
        streamer=heard,
        **{name: there(value) for name, value in options.items()},
    )
    return made.inner if gpu is not None else made, heard.told


@pytest.mark.parametrize(("options", "new"), [(GREEDY, 64), (SAMPLED, 12)], ids=["greedy", "drawn"])
@each
def test_a_step_is_not_waited_for(family: Family, options: dict[str, Any], new: int) -> None:
    expected, told = generated(family.model_of(**family.shallow), new, options)
    with SimulatedGPU() as gpu:
        made, heard = generated(moved(family.model_of(**family.shallow)), new, options, gpu)
    # Those for the prompt are not of a step.
    assert not [wait for wait in gpu.waits if "decode_late" in wait]
    assert gpu.fetched >= new
    assert torch.equal(made, expected)
    assert heard == told


@pytest.mark.parametrize(
    ("options", "new"),
    [(GREEDY, 18), (SAMPLED, 18), ({"do_sample": False, "eos_token_id": -1}, 18)],
    ids=["greedy", "drawn", "even"],
)
@each
def test_steps_are_done_again_as_they_were_recorded(
    family: Family, options: dict[str, Any], new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, told = generated(family.model_of(**family.shallow), new, options)
    graphs = Replayed()
    monkeypatch.setattr(recorded, "graphs_of", lambda device: graphs)
    with SimulatedGPU() as gpu:
        made, heard = generated(moved(family.model_of(**family.shallow)), new, options, gpu)
    assert not [wait for wait in gpu.waits if "decode_late" in wait]
    assert torch.equal(made, expected)
    assert heard == told
    # All but the first are made by a step.
    assert graphs.replays >= made.shape[1] - 10


@each
def test_no_step_of_an_engine_waits_but_for_its_tokens(family: Family) -> None:
    """Pieces of prompts beside steps, steps alone, and rows that draw beside others."""

    def made(model: Any, graphs: Graphs) -> list[list[int]]:
        torch.manual_seed(3)
        engine = Engine(model, 3, 32, recording=fixed_step.Recording(graphs))
        ways: list[dict[str, Any]] = [{"do_sample": False}, DRAWN, {"do_sample": False}]
        sequences = []
        for length, way in zip((5, 9, 13), ways, strict=True):
            ids = prompt_of(length, length)[0].tolist()
            sequences.append(engine.sequence(ids, max_new_tokens=8, eos_token_id=-1, **way))
            engine.add(sequences[-1])
            engine.step(engine.sequences, piece=4)
        while not all(one.finished for one in sequences):
            engine.step(engine.sequences, piece=4)
        return [one.new for one in sequences]

    expected, graphs = made(family.model_of(**family.shallow), Again()), Replayed()
    with SimulatedGPU() as gpu:
        assert made(moved(family.model_of(**family.shallow)), graphs) == expected
    assert not [wait for wait in gpu.waits if ENGINE_STEP.search(wait)]
    assert gpu.fetched
    assert graphs.replays


@each
def test_a_step_of_an_engine_begins_before_the_tokens_it_follows_are_read(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, read, begun = Replayed(), Fetched.read, []

    def noted(self: Fetched) -> Any:
        begun.append(graphs.replays)
        return read(self)

    monkeypatch.setattr(Fetched, "read", noted)
    with SimulatedGPU():
        model = moved(family.model_of(**family.shallow))
        engine = Engine(model, 2, 32, recording=fixed_step.Recording(graphs))
        for length in (5, 9):
            ids = prompt_of(length, length)[0].tolist()
            engine.add(engine.sequence(ids, max_new_tokens=6, eos_token_id=-1, do_sample=False))
        sequences = engine.sequences
        while not all(one.finished for one in sequences):
            engine.step(sequences)
    # The prompts' tokens; the first step, and the second; the third, and so on to the last.
    assert begun == [0, 2, 3, 4, 5, 5]


def test_what_cannot_be_recorded_is_generated_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, model = Replayed(), FAMILIES[0].model_of()
    expected = {}
    cases: dict[str, dict[str, Any]] = {
        "few": {"max_new_tokens": 8},
        "beams": {"num_beams": 2, "max_new_tokens": 20},
        "kept": {"return_dict_in_generate": True, "max_new_tokens": 20},
        "drafts": {"prompt_lookup_num_tokens": 2, "max_new_tokens": 20},
        "static": {"cache_implementation": "static", "max_new_tokens": 20},
        "uncached": {"use_cache": False, "max_new_tokens": 20},
    }
    for name, options in cases.items():
        expected[name] = model.generate(IDS[:1], pad_token_id=0, **options)
    monkeypatch.setattr(recorded, "graphs_of", lambda device: graphs)
    for name, options in cases.items():
        made = model.generate(IDS[:1], pad_token_id=0, **options)
        made, right = (x if isinstance(x, Tensor) else x.sequences for x in (made, expected[name]))
        assert torch.equal(made, right), name
    assert not graphs.replays


def test_copies_of_rows_and_adapters_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[0].model_of()
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 20}

    def drawn() -> Tensor:
        return model.generate(IDS, pad_token_id=0, generator=dice(), **options)

    def dice() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    expected = drawn()
    monkeypatch.setattr(recorded, "graphs_of", lambda device: Again())
    assert torch.equal(drawn(), expected)
    # What has a forward of its own, as adapters have, runs over the same rows as it is.
    model.model.norm.forward = model.model.norm.forward
    assert torch.equal(drawn(), expected)


def test_a_wait_is_noticed() -> None:
    waiting = {**GREEDY, "stopping_criteria": [lambda ids, scores: ids[:, -1] == int(ids[0, -1])]}
    with SimulatedGPU() as gpu:
        generated(moved(FAMILIES[0].model_of()), 3, waiting, gpu)
    assert [wait for wait in gpu.waits if "decode_late" in wait]


def test_no_token_comes_behind_the_end_of_all_rows() -> None:
    options = {**SAMPLED, "eos_token_id": [5, 9, 11, 22, 30, 33, 40, 41, 60, 72, 80, 90]}
    expected, _ = generated(FAMILIES[0].model_of(), 30, options)
    assert expected.shape[1] < 39
    with SimulatedGPU() as gpu:
        made, _ = generated(moved(FAMILIES[0].model_of()), 30, options, gpu)
    assert torch.equal(made, expected)


def test_a_row_without_a_token_is_told_of_one_step_late() -> None:
    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.tensor(ids.shape[1] == 12), -torch.inf, scores)

    options = {**GREEDY, "logits_processor": [forbid]}
    with pytest.raises(InputError, match="new token 4") as expected:
        generated(FAMILIES[0].model_of(), 8, options)
    with SimulatedGPU() as gpu, pytest.raises(InputError) as made:
        generated(moved(FAMILIES[0].model_of()), 8, options, gpu)
    assert str(made.value) == str(expected.value)
