"""Processes that save into one directory and load from it, all at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forking import Forks
from quintet.checkpoint import Checkpoint, read_consistently, save, save_stream
from quintet.errors import CheckpointError, SaveError
from quintet.files import locked
from waiting import until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes and their locks")

# Imports once, then forks: two that save, and loaders that run until both are done.
DRIVER = """
import os, sys, traceback
from pathlib import Path

import torch
from quintet import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
root, rounds, sizes = Path(sys.argv[1]), int(sys.argv[2]), [*map(int, sys.argv[3:])]

def make(value):
    config = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, rope_theta=1000.0 * value)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    model.generation_config = model.generation_config.replace(max_new_tokens=value)
    return model

def value_of(model):
    values = {float(number) for tensor in model.state_dict().values()
              for number in tensor.reshape(-1).unique()}
    values.add(model.config.rope_parameters["rope_theta"] / 1000)
    values.add(float(model.generation_config.max_new_tokens))
    assert len(values) == 1, f"a mix: {values}"
    return int(values.pop())

def save(value, size):
    model = make(value)
    done = 0
    # However slow the loaders are, each is to come in between; 500 if one of them died.
    while done < rounds or (done < 500 and len(list(root.parent.glob("loaded-*"))) < 2):
        model.save_pretrained(root, max_shard_size=size)
        done += 1

def load(savers):
    seen = []
    while not seen or any(os.path.exists(root.parent / f"saving-{value}") for value in savers):
        seen.append(value_of(AutoModelForCausalLM.from_pretrained(root)))
        if len(seen) == 5:
            (root.parent / f"loaded-{os.getpid()}").touch()
    # In one write: there are two of these.
    os.write(1, f"{len(seen)} {sorted(set(seen))}\\n".encode())

make(1).save_pretrained(root, max_shard_size=sizes[0])
children = {}
savers = range(1, len(sizes) + 1)
for value in savers:
    (root.parent / f"saving-{value}").touch()
for task in [*savers, 0, 0]:
    child = os.fork()
    if child:
        children[child] = task
        continue
    status = 1
    try:
        save(task, sizes[task - 1]) if task else load(savers)
        status = 0
    except BaseException:
        traceback.print_exc()
    if task:
        (root.parent / f"saving-{task}").unlink()
    os._exit(status)
while children:
    child, status = os.wait()
    assert status == 0, children[child]
    del children[child]
print("last", value_of(AutoModelForCausalLM.from_pretrained(root)))
"""


@pytest.mark.parametrize(
    "sizes", [("9999", "9999"), ("700", "1000"), ("9999", "700")], ids="-".join
)
def test_two_that_save_and_two_that_load_see_no_mix(
    tmp_path: Path, sizes: tuple[str, ...], forks: Forks
) -> None:
    root = tmp_path / "model"
    done = forks.run(DRIVER, root, 4, *sizes, environment=os.environ)
    assert done.returncode == 0, done.stderr
    *loads, last = [line.split() for line in done.stdout.splitlines()]
    assert len(loads) == 2
    assert all(int(line[0]) >= 5 for line in loads), loads
    assert last in (["last", "1"], ["last", "2"])
    names = {path.name for path in root.iterdir() if not path.name.startswith("model")}
    assert names == {"config.json", "generation_config.json"}, "nothing else is left behind"
    index = root / "model.safetensors.index.json"
    named = {info.file for info in Checkpoint.open(root).tensors.values()}
    assert {*root.glob("model*")} == named | ({index} if index.exists() else set())


class Holder:
    """A process in the middle of a save, of which one tensor never comes."""

    def __init__(self, directory: Path) -> None:
        started, starting = os.pipe()
        self.process = os.fork()
        if self.process == 0:

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                yield "w", torch.full((4,), 9.0)
                os.write(starting, b".")
                signal.pause()

            save_stream(directory, tensors(), max_shard_size=1)
            os._exit(0)
        os.close(starting)
        assert os.read(started, 1) == b"."
        os.close(started)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_who_waits_is_told_for_whom_and_is_let_in_when_that_one_is_killed(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(4)})
    holder = Holder(tmp_path)
    assert Checkpoint.open(tmp_path).tensors, "a save that runs keeps nobody from the old one"
    caught = pytest.warns(UserWarning, match=f"process {holder.process} .* is saving into")

    def kill_when_told() -> None:
        until(lambda: len(caught))
        holder.kill()

    killer = threading.Thread(target=kill_when_told)
    killer.start()
    with caught:
        save(tmp_path, {"w": torch.zeros(4)})
    killer.join()
    assert str(tmp_path) in str(caught[0].message)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert dict(Checkpoint.open(tmp_path).read("w"))["w"].tolist() == [0] * 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_who_has_waited_long_enough_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, {"w": torch.ones(4)})
    before = sorted(path.name for path in tmp_path.iterdir())
    holder = Holder(tmp_path)
    monkeypatch.setattr("quintet.files.PATIENCE", 0.1)
    with pytest.raises(SaveError, match=f"process {holder.process} .* is saving into") as caught:
        save(tmp_path, {"w": torch.zeros(4)})
    assert str(tmp_path) in str(caught.value)
    holder.kill()
    save(tmp_path, {"w": torch.zeros(4)})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_directory_that_is_replaced_while_one_waits_is_not_mistaken(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    saver = threading.Thread(target=save, args=(directory, {"w": torch.zeros(4)}))
    with locked(directory):
        saver.start()
        time.sleep(0.2)
        directory.rename(tmp_path / "old")
        directory.mkdir()
    saver.join()
    assert list((tmp_path / "old").iterdir()) == []
    assert [path.name for path in directory.iterdir()] == ["model.safetensors"]


def test_a_reader_looks_again_until_nothing_changes_between(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("0")
    seen: list[str] = []

    def read() -> str:
        seen.append(config.read_text())
        if len(seen) < 3:
            (tmp_path / "new").write_text(str(len(seen)))
            (tmp_path / "new").replace(config)
            raise CheckpointError("a shard has gone")
        return seen[-1]

    assert read_consistently(tmp_path, read) == "2"
    assert seen == ["0", "1", "2"]


def test_a_reader_is_told_what_is_wrong_where_no_save_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        read_consistently(tmp_path, read)
    assert calls == [1]

    def disturbed() -> None:
        (tmp_path / "config.json").write_text("x" * len(calls))
        calls.append(1)

    monkeypatch.setattr("quintet.checkpoint.consistency.PATIENCE", 0.1)
    with pytest.raises(CheckpointError, match="is saved into all the time"):
        read_consistently(tmp_path, disturbed)
