"""What rows take is what their memory takes, and what does not fit is refused."""

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, WIDE, Family, each
from generation.sequences import prompt_of
from quintet.errors import DoesNotFitError, InputError
from quintet.generation.engine import Engine as StepEngine
from quintet.generation.speculative.drafting import PredictedDrafting
from quintet.serving import Engine, Limits, memory
from quintet.serving.memory import cost_of, limits_for, room_of
from quintet.serving.scheduler import RowCost
from simulated_gpu import cuda_memory
from waiting import PATIENCE


def predicting() -> Any:
    """Return a model with a layer of multi-token prediction."""
    family = next(family for family in FAMILIES if family.name == "deepseek-v3")
    return family.model_of(**WIDE[family.name], num_nextn_predict_layers=1)


@each
@pytest.mark.parametrize("nbits", [None, 8, 4])
def test_rows_take_what_is_said(family: Family, nbits: int | None) -> None:
    model = family.model_of(**WIDE[family.name])
    cost = cost_of(model, nbits)
    engine = StepEngine(model, 3, 50, nbits=nbits)
    assert engine.nbytes == 3 * cost.of(50)
    assert engine.bytes_of_rows() == (cost.row, cost.token)
    assert bool(cost.row) == bool(model.config.recurrent_layers())
    # What is copied of a row is as large.
    sequence = engine.sequence(prompt_of(20, 1), max_new_tokens=2, do_sample=False)
    engine.add(sequence)
    engine.step([sequence])
    assert engine.extract(sequence, 0, 20).nbytes == cost.of(20)


@pytest.mark.parametrize("nbits", [None, 8])
def test_drafts_by_prediction_layers_take_what_is_said(nbits: int | None) -> None:
    """What these keep of each token, and what they have yet to read of a prompt."""
    model = predicting()
    cost = cost_of(model, nbits)
    assert cost.drafted
    engine = StepEngine(model, 2, 100, nbits=nbits)
    sequence = engine.sequence(prompt_of(60, 1), max_new_tokens=9, do_sample=False, use_mtp=True)
    engine.add(sequence)
    engine.step([sequence], piece=50)
    drafting = sequence.drafting
    assert isinstance(drafting, PredictedDrafting)
    unread = drafting.unread()
    assert unread is not None
    assert unread.states.nbytes + unread.embeds.nbytes == 50 * cost.unread
    while not sequence.finished:
        engine.step([sequence])
    assert engine.nbytes == 2 * (cost.of(100) + 100 * cost.drafted)


def test_a_row_that_is_drafted_for_counts_as_what_it_takes() -> None:
    model, prompt = predicting(), prompt_of(60, 1)
    cost = cost_of(model, None)
    given: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1}

    def held(engine: Engine, speculate: str) -> int:
        """Return the bytes that count when the first token is there."""
        goes_on = threading.Event()

        def halt(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert ids.shape[1] == 60 or goes_on.wait(PATIENCE)
            return logits

        answers = engine.answer(prompt, speculate=speculate, logits_processor=[halt], **given)
        next(answers)
        taken = engine.state.held
        goes_on.set()
        assert list(answers)
        return taken

    with Engine(model, limits=Limits(rows=1, capacity=100)) as engine:
        assert held(engine, "off") == cost.of(61)
        assert held(engine, "mtp") == cost.of(61) + 61 * cost.drafted
    with Engine(model, limits=Limits(rows=1, capacity=100, memory=cost.of(70))) as engine:
        assert list(engine.answer(prompt, **given))
        with pytest.raises(DoesNotFitError, match="give the engine more memory"):
            next(engine.answer(prompt, speculate="mtp", **given))


def test_limits_and_what_is_shown_count_what_drafts_take() -> None:
    model = predicting()
    cost = cost_of(model, None)
    assert cost.drafting.token == cost.token + cost.drafted + cost.unread
    room = cost.drafting.of(128)
    with pytest.raises(DoesNotFitError):
        limits_for(model, memory=room - 1, kept=0, speculate="mtp")
    limits = limits_for(model, memory=room - 1, kept=0)
    assert limits_for(model, memory=room, kept=0, speculate="mtp").memory == room
    with Engine(model, limits=limits) as engine:
        assert engine.room.token == cost.token
    with Engine(model, limits=limits, speculate="mtp") as engine:
        assert engine.room.token == cost.drafting.token


def test_limits_fit_into_memory() -> None:
    model = FAMILIES[0].model_of()
    cost = cost_of(model, None)
    limits = limits_for(model, memory=10 * cost.of(128), rows=20, kept=2 * cost.of(128))
    assert (limits.rows, limits.capacity, limits.memory) == (20, 128, 8 * cost.of(128))
    room = room_of(model, limits)
    assert (room.row, room.token) == (cost.row, cost.token)
    assert room.tokens == 8 * 128
    assert room.whole == 8 * cost.of(128)
    assert room.weights >= sum(x.nbytes for x in model.parameters())
    with Engine(model, limits=limits) as engine:
        assert engine.room == room
        assert list(engine.answer(prompt_of(9, 1), max_new_tokens=3))
    assert room_of(model, Limits(rows=2, capacity=100)).tokens == 200
    assert limits_for(model).kept > 0
    with pytest.raises(DoesNotFitError, match=r"128 tokens takes .* 64 tokens fit: give less"):
        limits_for(model, memory=cost.of(64), kept=0)
    with pytest.raises(InputError, match="capacity=129"):
        limits_for(model, capacity=129)
    wrong: dict[str, list[Any]] = {
        "memory": [0, "x", 1e9, math.nan],
        "kept": [-1, "x", 0.5],
        "rows": [0, 1.5],
        "capacity": [0, 1.5, "x"],
        "speculate": ["x"],
        "nbits": [8.0, 5],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InputError, match="bits: a" if name == "nbits" else f"{name}="):
                limits_for(model, **{name: value})


def test_a_gpu_has_as_many_rows_as_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    # What limits are found of.
    model: Any = SimpleNamespace(config=FAMILIES[0].config(), device=torch.device("cuda", 0))
    monkeypatch.setattr(memory, "cost_of", lambda model, nbits: RowCost(100, 1000))
    row = RowCost(100, 1000).of(128)
    with cuda_memory(12 * row):
        found = limits_for(model, kept=row)
        assert (found.rows, found.memory) == (8, int(0.8 * 12 * row) - row)
        assert limits_for(model, kept=row, rows=3).rows == 3
        # Not more than there is room for, as all are taken at once.
        assert limits_for(model, kept=row, rows=20).rows == 8
        assert limits_for(model, kept=row, memory=5 * row).rows == 4
        with pytest.raises(DoesNotFitError, match="there is room for"):
            limits_for(model, kept=9 * row)
    with cuda_memory(10**4 * row):
        assert limits_for(model, kept=row).rows == 64
    with cuda_memory(11 * row, kept=row):
        assert limits_for(model, kept=row).rows == 8


WRONG: dict[str, list[Any]] = {
    **{
        name: [-1, 1e3, "5", True, None] for name in ("rows", "capacity", "queue", "piece", "ahead")
    },
    "memory": [0, 1e9, "8MiB", math.nan],
    "kept": [-1, 1e9, None],
    "itl_target_ms": [0, -1.0, math.nan, "5", True],
    "patience": [-1, math.nan, "5", None, 10**400],
}


@pytest.mark.parametrize("name", WRONG)
def test_limits_are_numbers_that_can_be(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(InputError, match=f"{name}="):
            Limits(**{name: value})
    assert Limits(patience=math.inf, itl_target_ms=math.inf, memory=1, kept=0).rows == 8


def test_fewer_bits_take_less() -> None:
    model = FAMILIES[0].model_of(**WIDE["qwen2"])
    taken = [cost_of(model, nbits).token for nbits in (None, 8, 6, 4)]
    assert taken == sorted(taken, reverse=True)
    assert len(set(taken)) == 4


def test_a_prompt_that_does_not_fit_is_refused_before_it_waits() -> None:
    model = FAMILIES[0].model_of()
    memory = cost_of(model, None).of(60)
    with Engine(model, limits=Limits(rows=2, capacity=100, memory=memory, ahead=10)) as engine:
        with pytest.raises(DoesNotFitError, match="enough for 60 tokens"):
            next(engine.answer(prompt_of(51, 1), max_new_tokens=20))
        assert len(list(engine.answer(prompt_of(50, 1), max_new_tokens=20, eos_token_id=-1))) == 20
