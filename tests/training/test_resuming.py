"""Trainings that are interrupted, in every way, go on to the same bits."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint import Checkpoint
from quintet.errors import CheckpointError, InputError, SaveError
from quintet.files import locked
from quintet.training.config import TrainingConfig
from quintet.training.loop import train
from trainings import MODELS, Heard, material, settings
from waiting import PATIENCE, until


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def weights(path: Path, folder: str = "", stem: str = "model") -> dict[str, torch.Tensor]:
    files = Checkpoint.open(path / folder, stem=stem)
    return {name: tensor.clone() for name, tensor in files.read(files.tensors)}


def assert_same(one: Path, other: Path, stem: str = "model") -> None:
    for folder, name in (("", stem), ("training", "optimizer")):
        ours, theirs = weights(one, folder, name), weights(other, folder, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


# `make kills` sets it to 50.
KILLS = int(os.environ.get("QUINTET_KILLS", "3"))
ADAPTER = {"r": 2, "lora_dropout": 0.2, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}
BALANCE = {"bias": {"kind": "linear", "peak": 0.01, "warmup": 0.0}}
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"train": {"batches": {"kind": "deepseek-v3-batch", "first": 1, "last": 3}}},
    "chats": {"data": {"files": "chats.jsonl"}},
    "pairs": {"data": {"files": "pairs.jsonl"}, "objective": {"kind": "preference"}},
    "pairs with an adapter": {
        "data": {"files": "pairs.jsonl"},
        "objective": {"kind": "preference"},
        "adapter": ADAPTER,
    },
    "adapter": {"adapter": ADAPTER},
    "muon in bfloat16": {"optimizer": {"kind": "muon", "precision": "bfloat16"}},
    "deepseek_v3": {"balance": BALANCE, "objective": {"prediction": 0.3}},
    "qwen2_moe": {"balance": {"auxiliary": 0.01}, "optimizer": {"precision": "autocast"}},
    "deepseek_v2": {"balance": {"expert": 0.003, "device": 0.05, "devices": 2, "reached": 1}},
    "zamba2": {"optimizer": {"schedule": {"kind": "cosine"}}, "train": {"parts": 2}},
}


@pytest.mark.parametrize("name", CASES)
def test_what_goes_on_is_what_would_have_followed(name: str, root: Path, tmp_path: Path) -> None:
    kind = name if name in MODELS else "qwen2"
    config = settings(root, tmp_path / "whole", kind, checkpoint={"every": 4}, **CASES[name])
    whole = Heard()
    ended = train(config, report=whole)
    # As it was when step 4 was saved.
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "step-00000006")
    before = weights(tmp_path / "part" / "step-00000004", "training", "optimizer")
    again = Heard()
    part = settings(root, tmp_path / "part", kind, checkpoint={"every": 9}, **CASES[name])
    resumed = train(part, resume=True, report=again)
    assert again.losses == {step: whole.losses[step] for step in (5, 6)}
    assert_same(ended.path, resumed.path, "adapter_model" if "adapter" in name else "model")
    # Training in memory that is mapped from the files of a checkpoint would change them.
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in weights(
            tmp_path / "part" / "step-00000004", "training", "optimizer"
        ).items()
    )


def in_a_process(run: Callable[[], object]) -> int:
    """Start a fork of this process that runs something, and return its id."""
    child = os.fork()
    if child:
        return child
    # Whoever runs the tests in the background may have told them to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def slow(config: TrainingConfig, done: Path, **options: Any) -> None:
    """Train, and leave a mark of each step that is done."""

    class Marks(Heard):
        def step(self, record: Any) -> None:
            with done.open("a") as file:
                file.write(f"{record.step} {record.loss!r}\n")

    train(config, report=Marks(), **options)


def wait_for(step: int, done: Path) -> None:
    until(lambda: done.exists() and len(done.read_text().splitlines()) >= step)


def test_a_training_that_is_killed_again_and_again_ends_as_one_that_was_not(
    root: Path, tmp_path: Path
) -> None:
    tables = {"checkpoint": {"every": 1}, "train": {"steps": 2 + 4 * KILLS}}
    whole = Heard()
    ended = train(settings(root, tmp_path / "whole", **tables), report=whole)
    config, marks = settings(root, tmp_path / "part", **tables), tmp_path / "marks"
    lots = random.Random(5)
    for _ in range(KILLS):
        child = in_a_process(lambda: slow(config, marks, resume=True))
        wait_for(1 + len(marks.read_text().splitlines()) if marks.exists() else 1, marks)
        time.sleep(lots.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    again = train(config, resume=True)
    for line in marks.read_text().splitlines():
        step, _, loss = line.partition(" ")
        assert float(loss) == whole.losses[int(step)]
    assert_same(ended.path, again.path)
    left = [path.name for path in (tmp_path / "part").iterdir() if path.name.startswith(".")]
    assert not left


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_a_training_after_its_step_and_saves_it(
    number: signal.Signals, code: int, root: Path, tmp_path: Path
) -> None:
    config, marks = settings(root, tmp_path / "run", train={"steps": 5000}), tmp_path / "marks"
    child = in_a_process(lambda: slow(config, marks))
    wait_for(3, marks)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    taken = len(marks.read_text().splitlines())
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == [f"step-{taken:08d}"]
    again = Heard()
    train(settings(root, tmp_path / "run", train={"steps": taken + 1}), resume=True, report=again)
    assert list(again.losses) == [taken + 1]


def test_a_second_signal_ends_it_at_once(root: Path, tmp_path: Path) -> None:
    config, marks = settings(root, tmp_path / "run"), tmp_path / "marks"

    class Stuck(Heard):
        def step(self, record: Any) -> None:
            marks.write_text("1 there")
            time.sleep(10 * PATIENCE)

    child = in_a_process(lambda: train(config, report=Stuck()))
    wait_for(1, marks)
    began, sent, ended = time.monotonic(), 0, 0
    while not ended:
        # Two that come before the process runs again are one to it.
        os.kill(child, signal.SIGINT)
        sent += 1
        for _ in range(40):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01 * sent)
    assert os.waitstatus_to_exitcode(status) == 130
    assert sent > 1
    assert time.monotonic() - began < PATIENCE
    assert not list((tmp_path / "run").glob("step-*"))


def test_in_another_thread_signals_are_left_alone(root: Path, tmp_path: Path) -> None:
    from threading import Thread

    before, seen = signal.getsignal(signal.SIGTERM), []

    class Looks(Heard):
        def step(self, record: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    config = settings(root, tmp_path / "run", train={"steps": 1})
    thread = Thread(target=lambda: train(config, report=Looks()))
    thread.start()
    thread.join()
    assert seen == [before]


# -- what is another training ----------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(settings(root, folder, train={"steps": 2}))
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        (
            {"optimizer": {"learning_rate": 1e-3}},
            r"optimizer.learning_rate is 0.001, and was 0.003",
        ),
        ({"train": {"steps": None, "tokens": 99}}, r"train.tokens is 99, and was not there"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype is 'bfloat16', and was 'float32'"),
        ({"adapter": {}}, "adapter is .*, and was not there"),
    ],
)
def test_another_training_is_refused(
    tables: dict[str, Any], told: str, root: Path, run: Path
) -> None:
    with pytest.raises(InputError, match=told):
        train(settings(root, run, **tables), resume=True)


def test_other_texts_are_refused_unless_they_are_meant(root: Path, run: Path) -> None:
    texts = run.parent / "texts"
    shutil.copytree(root / "texts", texts)
    (texts / "0.txt").write_text("Others.\n" * 40)
    tables = {"data": {"sources": [{"paths": [str(texts)]}]}, "train": {"steps": 3}}
    with pytest.raises(InputError, match=r"data is '.*', and was '"):
        train(settings(root, run, **tables), resume=True)
    again = Heard()
    assert train(settings(root, run, **tables), resume="changed", report=again).step == 3
    assert any("data is" in warning for warning in again.warnings)


def test_what_is_free_to_differ_does_not_matter(root: Path, run: Path) -> None:
    moved = run.rename(run.parent / "moved")
    tables = {"train": {"steps": 3, "skips": 9}, "checkpoint": {"keep": 1}, "report": {"every": 2}}
    assert train(settings(root, moved, **tables), resume=True).step == 3
    assert [path.name for path in moved.glob("step-*")] == ["step-00000003"]


def test_a_run_is_not_begun_where_there_is_one(root: Path, run: Path) -> None:
    with pytest.raises(InputError, match="holds a run of 2 steps; go on with it by resume=True"):
        train(settings(root, run))


def test_a_run_that_is_done_is_done(root: Path, run: Path) -> None:
    again = Heard()
    assert train(settings(root, run, train={"steps": 2}), resume=True, report=again).step == 2
    assert not again.records


def test_two_trainings_in_one_folder_are_one_too_many(root: Path, run: Path) -> None:
    with locked(run), pytest.raises(SaveError, match="another directory"):
        train(settings(root, run), resume=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "another version of this library"),
        ({"counters": {"step": 2}}, "not the counters of a training"),
        ({"random": {"torch": "00"}}, "random numbers cannot be taken over"),
    ],
)
def test_a_state_that_is_not_understood_is_refused(
    changes: dict[str, Any], told: str, root: Path, run: Path
) -> None:
    path = run / "step-00000002" / "training" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=told):
        train(settings(root, run, train={"steps": 3}), resume=True)


def test_a_checkpoint_that_lacks_something_is_passed_over(root: Path, run: Path) -> None:
    shutil.copytree(run / "step-00000002", run / "step-00000009")
    model = run / "step-00000009" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    again = Heard()
    assert train(settings(root, run, train={"steps": 3}), resume=True, report=again).step == 3
    assert list(again.losses) == [3]
