"""Prediction layers draft for sequences of an engine as they do for each alone."""

import random
from typing import Any

import pytest
import torch

from families.deepseek import model_of
from generation.sequences import ENDS, prompt_of, run
from quintet.generation.engine import Engine
from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.sequence import Sequence
from quintet.modeling.mtp import MtpDecoderModel

PLAIN: dict[str, Any] = {"eos_token_id": -1, "do_sample": False}


def seeded(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(row)


def options_of(row: int) -> dict[str, Any]:
    """Return options of which no two rows have the same."""
    return {
        **ENDS,
        "do_sample": row % 2 == 1,
        "use_mtp": row != 2,
        "max_new_tokens": 5 + 4 * row,
        **({"repetition_penalty": 1.3} if row == 3 else {}),
        **({"num_assistant_tokens": 4} if row == 4 else {}),
    }


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*has no effect without:UserWarning")
def test_each_gets_the_drafts_and_the_text_that_it_gets_alone(depth: int) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=depth)
    engine = Engine(model, 5, 64)
    sequences = [
        engine.sequence(prompt_of(3 + 4 * row, row), generator=seeded(row), **options_of(row))
        for row in range(5)
    ]
    for sequence in sequences:
        engine.add(sequence)
    dice = random.Random(depth)
    while not all(one.finished for one in sequences):
        # Any of them, in any order; prompts in pieces.
        engine.step(dice.sample(sequences, dice.randint(1, 5)), 4)
    drafted = 0
    for row, sequence in enumerate(sequences):
        out = model.generate(
            prompt_of(3 + 4 * row, row),
            generator=seeded(row),
            return_dict_in_generate=True,
            **options_of(row),
        )
        assert sequence.new == out.sequences[0, 3 + 4 * row :].tolist()
        if sequence.drafting is not None:
            found = sequence.drafting.found
            assert found.accepted == out.speculation.accepted
            drafted += found.drafted_tokens
    assert drafted > 10


def test_a_step_runs_each_layer_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    engine = Engine(model, 4, 64)
    # Rows of which none has as many drafts taken as another.
    sequences = [
        engine.sequence(prompt_of(5, row), use_mtp=True, max_new_tokens=12, **PLAIN)
        for row in range(4)
    ]
    calls: list[int] = []
    predict = MtpDecoderModel.predict

    def spy(self: Any, depth: int, *args: Any) -> Any:
        calls.append(depth)
        return predict(self, depth, *args)

    monkeypatch.setattr(MtpDecoderModel, "predict", spy)
    for sequence in sequences:
        engine.add(sequence)
    engine.step(sequences)
    assert calls == []  # there is nothing to draft behind a prompt
    while not any(one.finished for one in sequences):
        calls.clear()
        engine.step(sequences)
        assert calls in ([0, 1], [])


def test_one_that_leaves_and_comes_again_becomes_the_same_text() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    prompt, options = prompt_of(9, 1), {"use_mtp": True, "max_new_tokens": 20, **PLAIN}
    expected = model.generate(prompt, **options)[0, 9:].tolist()
    for keeps in (True, False):
        engine = Engine(model, 2, 40)
        sequence, other = (engine.sequence(prompt, **options) for _ in range(2))
        engine.add(other)
        engine.add(sequence)
        for _ in range(4):
            engine.step([sequence, other])
        content = (engine.extract(sequence),) if keeps else ()
        engine.remove(sequence)
        engine.step([other])
        engine.add(sequence, *content)
        while not (sequence.finished and other.finished):
            engine.step([other, sequence])
        assert sequence.new == other.new == expected
        found = sequence.drafting
        assert found is not None
        # It is drafted for again, too.
        assert found.found.drafted_tokens > 8


class _Stumbling(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("stumbled")
        return scores


@pytest.mark.parametrize("after", range(1, 7))
def test_one_that_fails_while_it_is_drafted_for_ends_alone(after: int) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    engine = Engine(model, 2, 40)
    options: dict[str, Any] = {"use_mtp": True, "max_new_tokens": 8, **PLAIN}
    good = engine.sequence(prompt_of(6, 1), **options)
    bad = engine.sequence(prompt_of(6, 2), logits_processor=[_Stumbling(after)], **options)
    run(engine, [bad, good])
    assert bad.finish_reason == "error"
    assert good.new == model.generate(prompt_of(6, 1), **options)[0, 6:].tolist()


def test_a_step_whose_layers_fail_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    engine = Engine(model, 2, 40)
    options: dict[str, Any] = {"use_mtp": True, "max_new_tokens": 9, "eos_token_id": -1}
    sequences: list[Sequence] = [
        engine.sequence(prompt_of(6 + row, row), do_sample=True, generator=seeded(row), **options)
        for row in range(2)
    ]
    for sequence in sequences:
        engine.add(sequence)
    engine.step(sequences)
    predict = MtpDecoderModel.predict

    def failing(self: Any, depth: int, *args: Any) -> Any:
        if depth:
            raise MemoryError
        return predict(self, depth, *args)

    while not all(one.finished for one in sequences):
        monkeypatch.setattr(MtpDecoderModel, "predict", failing)
        lengths = [len(one.ids) for one in sequences]
        if all(not one.finished and len(one.new) < 8 for one in sequences):
            with pytest.raises(MemoryError):
                engine.step(sequences)
            assert [len(one.ids) for one in sequences] == lengths
        monkeypatch.setattr(MtpDecoderModel, "predict", predict)
        engine.step(sequences)
    for row, sequence in enumerate(sequences):
        expected = model.generate(
            prompt_of(6 + row, row), do_sample=True, generator=seeded(row), **options
        )
        assert sequence.new == expected[0, 6 + row :].tolist()
