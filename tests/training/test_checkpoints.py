"""Checkpoints of a run: there is the one before or the new one, whatever fails or dies when."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quintet import Qwen2Config, Qwen2ForCausalLM
from quintet.checkpoint import Checkpoint
from quintet.errors import SaveError
from quintet.training.checkpoints import best, clean_up, prune, put, read_tensors, saved_checkpoints

CALLS = ("fsync", "replace", "mkdir")


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


def write(run: Path, step: int, model: Qwen2ForCausalLM, score: float | None = None) -> Path:
    state = {"counters": {"step": step}} | ({} if score is None else {"score": score})
    return put(run, step, model.save_pretrained, {"w": torch.full((4,), float(step))}, state)


def breaking(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call something before each call that writes; return the list that these are noted in."""
    calls: list[str] = []
    for name in CALLS:
        real = getattr(os, name)

        def call(*given: object, name: str = name, real: Callable[..., object] = real) -> object:
            calls.append(name)
            act(len(calls))
            return None if name == "fsync" else real(*given)

        monkeypatch.setattr(os, name, call)
    return calls


def number_of_calls(run: Path, model: Qwen2ForCausalLM) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = breaking(patch, lambda number: None)
        write(run, 1, model)
    return len(calls)


def intact(run: Path, steps: set[int]) -> bool:
    """Tell whether a run has just these checkpoints, and each is whole."""
    found = saved_checkpoints(run)
    for one in found:
        Checkpoint.open(one.path)
        assert read_tensors(one)["w"].tolist() == [one.step] * 4
        assert one.state["counters"] == {"step": one.step}
    return {one.step for one in found} == steps


def test_a_save_that_fails_anywhere_leaves_what_was_there(
    model: Qwen2ForCausalLM, tmp_path: Path
) -> None:
    # The last is after the folder is in its place: it may be lost by a power failure alone.
    for fails in range(1, number_of_calls(tmp_path, model)):

        def full(number: int, fails: int = fails) -> None:
            if number >= fails:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            breaking(patch, full)
            with pytest.raises(SaveError, match=r"step-00000002 is not saved.*No space left"):
                write(tmp_path, 2, model)
        assert intact(tmp_path, {1}), fails
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_save_that_dies_anywhere_leaves_what_was_there_or_the_new_one(
    model: Qwen2ForCausalLM, tmp_path: Path
) -> None:
    number_of = number_of_calls(tmp_path, model)
    seen = set()
    for dies in range(1, number_of + 2):
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                breaking(patch, lambda number, dies=dies: os._exit(9) if number == dies else None)
                write(tmp_path, 2, model)
            os._exit(0)
        os.waitpid(child, 0)
        there = {one.step for one in saved_checkpoints(tmp_path)}
        assert there in ({1}, {1, 2})
        assert intact(tmp_path, there)
        seen.add(len(there))
        clean_up(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        prune(tmp_path, 1) if there == {1} else [
            os.rename(tmp_path / "step-00000002", tmp_path / ".removing-x"),
            clean_up(tmp_path),
        ]
    assert seen == {1, 2}


def test_the_last_and_the_best_are_kept(model: Qwen2ForCausalLM, tmp_path: Path) -> None:
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.0}
    for step, score in scores.items():
        write(tmp_path, step, model, score)
    found = best(saved_checkpoints(tmp_path))
    assert found is not None
    assert (found.step, found.score) == (2, 1.0)
    prune(tmp_path, 2)
    assert [one.step for one in saved_checkpoints(tmp_path)] == [2, 4, 5]


def test_a_step_that_is_saved_again_is_replaced(model: Qwen2ForCausalLM, tmp_path: Path) -> None:
    write(tmp_path, 1, model)
    write(tmp_path, 1, model, 0.5)
    assert [one.score for one in saved_checkpoints(tmp_path)] == [0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "training/state.json", "config.json"])
def test_a_checkpoint_without_one_of_its_files_is_none(
    name: str, model: Qwen2ForCausalLM, tmp_path: Path
) -> None:
    (write(tmp_path, 1, model) / name).unlink()
    assert saved_checkpoints(tmp_path) == []
