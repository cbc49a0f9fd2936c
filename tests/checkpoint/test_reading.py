import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quintet.checkpoint import Checkpoint
from quintet.errors import CheckpointError, InputError

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(3.0), "b": torch.ones(2, 2)},
    "model-00002-of-00002.safetensors": {"c": torch.zeros(4, dtype=torch.int8)},
}
INDEX = "model.safetensors.index.json"


def sharded(directory: Path, **changes: Any) -> Path:
    """Write a sharded checkpoint whose index has these names for its tensors."""
    weight_map = {name: file for file, tensors in SHARDS.items() for name in tensors}
    for file, tensors in SHARDS.items():
        save_file(tensors, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {**weight_map, **changes}}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def refusal(directory: Path, variant: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory, variant=variant)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def values(directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory, **options)
    return dict(checkpoint.read(checkpoint.tensors))


# -- what is read ------------------------------------------------------------------------------


def test_shards_of_another_writer_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["b"].shape == (2, 2)
    assert checkpoint.tensors["c"].dtype == torch.int8
    assert checkpoint.tensors["c"].file == tmp_path / "model-00002-of-00002.safetensors"
    assert checkpoint.total_bytes == 12 + 16 + 4
    assert checkpoint.metadata == {"format": "pt"}
    read = dict(checkpoint.read(["c", "a", "a"]))
    assert list(read) == ["a", "c"], "in the order of the files, each once"
    assert read["a"].tolist() == [0, 1, 2]


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    save_file({"only": torch.ones(1)}, sharded(tmp_path) / "model.safetensors")
    assert list(values(tmp_path)) == ["only"]


def test_an_index_needs_no_metadata(tmp_path: Path) -> None:
    index = json.loads((sharded(tmp_path) / INDEX).read_text())
    del index["metadata"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert len(values(tmp_path)) == 3


def test_a_variant_is_another_set_of_files(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"half": torch.ones(1).half()}, tmp_path / "model.fp16.safetensors")
    (tmp_path / INDEX).rename(tmp_path / "model.safetensors.index.bf16.json")
    assert list(values(tmp_path, variant="fp16")) == ["half"]
    assert list(values(tmp_path, variant="bf16")) == ["a", "b", "c"]
    for variant in (None, "fp8"):
        message = refusal(tmp_path, variant)
        assert "model.fp16.safetensors" in message
        assert "variant" in message
    with pytest.raises(InputError, match=r"variant='\.\./x'"):
        Checkpoint.open(tmp_path, variant="../x")


def test_a_name_that_is_not_there_is_refused_before_reading(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no tensor\n  'lm_head\.weight'"):
        checkpoint.read(["a", "lm_head.weight"])


def test_changing_a_tensor_in_place_does_not_change_the_file(tmp_path: Path) -> None:
    values(sharded(tmp_path))["a"].add_(100)
    assert values(tmp_path)["a"].tolist() == [0, 1, 2]


def test_files_replaced_after_opening_are_read_as_they_were(tmp_path: Path) -> None:
    second = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    checkpoint = Checkpoint.open(tmp_path)
    stream = checkpoint.read(checkpoint.tensors)
    assert [next(stream)[0], next(stream)[0]] == ["a", "b"]
    save_file({"c": torch.full((4,), 9, dtype=torch.int8)}, tmp_path / "new")
    os.replace(tmp_path / "new", second)
    (name, tensor), *rest = stream
    assert (name, rest) == ("c", [])
    assert (tensor != 9).all()
    with pytest.raises(CheckpointError, match="was changed after") as caught:
        list(checkpoint.read("c"))
    assert str(second) in str(caught.value)
    second.unlink()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        list(checkpoint.read("c"))
    assert str(second) in str(caught.value)


def test_a_file_overwritten_in_place_after_opening_is_refused(tmp_path: Path) -> None:
    first = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="was changed after") as caught:
        list(checkpoint.read("a"))
    assert str(first) in str(caught.value)


def test_opening_and_reading_a_part_leaves_the_rest_on_the_disk(tmp_path: Path) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says how much memory is resident")
    size = 200_000_000
    entries = {
        "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [size, size + 16]},
    }
    raw = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + size + 16)
    before = resident()
    checkpoint = Checkpoint.open(tmp_path)
    tensors = dict(checkpoint.read(checkpoint.tensors))
    assert tensors["small"].tolist() == [0, 0, 0, 0]
    assert resident() - before < 50_000_000


# -- what is refused ---------------------------------------------------------------------------


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "none")


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (os.environ["QUINTET_TEST_TRAP"],)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_pickles_are_refused_unread(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("QUINTET_TEST_TRAP", str(trap))
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    message = refusal(tmp_path)
    assert name in message
    assert "can run code" in message
    assert "Convert them to safetensors" in message
    assert not trap.exists()


def test_a_pickle_under_a_good_name_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("QUINTET_TEST_TRAP", str(trap))
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "model.safetensors" in refusal(tmp_path)
    assert not trap.exists()


INDEXES = {
    "a list": "[]",
    "not JSON": "{",
    "no weight_map": '{"metadata": {}}',
    "a list as weight_map": '{"weight_map": []}',
    "an empty weight_map": '{"weight_map": {}}',
    "metadata a list": '{"metadata": [], "weight_map": {"a": "x.safetensors"}}',
    "save_id a number": '{"metadata": {"save_id": 1}, "weight_map": {"a": "x.safetensors"}}',
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_none_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / INDEX).write_text(INDEXES[kind])
    assert INDEX in refusal(tmp_path)


def test_a_tensor_in_two_shards_by_the_index_is_refused(tmp_path: Path) -> None:
    first, second = SHARDS
    text = json.dumps({"weight_map": {"a": first}})[:-2] + f', "a": "{second}"}}}}'
    (sharded(tmp_path) / INDEX).write_text(text)
    assert "'a' is there twice" in refusal(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "sub\\secret.safetensors",
        "C:secret.safetensors",
        "secret\0.safetensors",
        "..",
        ".",
        "",
        "x" * 300 + ".safetensors",
        "\ud800.safetensors",
        7,
        None,
        ["secret.safetensors"],
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_a_shard_that_is_no_plain_name_is_refused_unopened(tmp_path: Path, shard: object) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for folder in (tmp_path, inner / "sub"):
        save_file({"w": torch.ones(1)}, folder / "secret.safetensors")
    message = refusal(sharded(inner, **{"layer.w": shard}))
    assert INDEX in message
    assert "'layer.w'" in message
    message.encode()


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"c": torch.ones(4)}, tmp_path / "secret")
    shard = sharded(inner) / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    message = refusal(inner)
    assert str(shard) in message
    assert "link that leads out" in message
    (inner / "model.safetensors").symlink_to("../secret")
    assert "link that leads out" in refusal(inner)


def test_a_link_inside_and_a_linked_directory_are_fine(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    shard = sharded(inner) / "model-00002-of-00002.safetensors"
    shard.rename(inner / "elsewhere")
    shard.symlink_to("elsewhere")
    (tmp_path / "alias").symlink_to(inner)
    assert len(values(tmp_path / "alias")) == 3


@pytest.mark.parametrize("subfolder", ["", "unet"])
def test_the_links_of_the_hub_cache_are_followed_into_its_blobs_only(
    tmp_path: Path, subfolder: str
) -> None:
    cache = tmp_path / "models--o--n"
    snapshot = cache / "snapshots" / "abc" / subfolder
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    sharded(snapshot)
    for path in list(snapshot.glob("model*")):
        blob = cache / "blobs" / f"hash-of-{path.name}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    assert len(values(snapshot)) == 3
    (cache / "blobs").rename(cache / "other")
    (cache / "blobs").symlink_to("other")
    assert "link that leads out" in refusal(snapshot)


def test_a_directory_a_pipe_and_a_loop_are_no_shards(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    assert f"{shard} has to be a regular file" in refusal(tmp_path)
    shard.rmdir()
    os.mkfifo(shard)
    assert f"{shard} has to be a regular file" in refusal(tmp_path)
    shard.unlink()
    shard.symlink_to(shard.name)
    assert f"{shard} cannot be read" in refusal(tmp_path)


def test_all_missing_shards_are_listed_with_what_they_hold(tmp_path: Path) -> None:
    for shard in SHARDS:
        (sharded(tmp_path) / shard).unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    message = refusal(tmp_path)
    assert "names 2 shards, of which 2 are missing" in message
    assert "model-00001-of-00002.safetensors (2 tensors)" in message
    assert "model-00002-of-00002.safetensors (1 tensor)" in message


def test_a_damaged_shard_is_refused_before_any_tensor_is_read(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(tmp_path)
    assert str(shard) in message
    assert "'c' ends at byte 4 of the data, of which there are 3, 1 too few" in message


def test_tensors_that_the_shards_lack_are_listed(tmp_path: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    message = refusal(sharded(tmp_path, **{f"gone.{i:02}": first for i in range(12)}))
    assert "12 tensors that the shards lack" in message
    assert f"'gone.00' in {first}" in message
    assert "and 2 more" in message


def test_tensors_that_the_index_does_not_name_are_listed(tmp_path: Path) -> None:
    first, second = SHARDS
    save_file({**SHARDS[first], "extra.w": torch.ones(1)}, sharded(tmp_path) / first)
    message = refusal(tmp_path)
    assert INDEX in message
    assert f"'extra.w' in {first}" in message
    save_file({**SHARDS[second], "a": torch.ones(3)}, sharded(tmp_path) / second)
    assert f"'a' in {second}, but also in {first}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index_id", "first_id", "second_id", "fine"),
    [
        (None, None, None, True),
        ("1", "1", "1", True),
        (None, "1", "1", True),
        (None, "1", None, True),
        (None, "1", "2", False),
        ("1", "1", "2", False),
        ("1", "2", "2", False),
        ("1", "1", None, False),
    ],
)
def test_shards_of_different_saves_are_refused(
    tmp_path: Path, index_id: str | None, first_id: str | None, second_id: str | None, fine: bool
) -> None:
    sharded(tmp_path)
    for (file, tensors), save_id in zip(SHARDS.items(), (first_id, second_id), strict=True):
        save_file(tensors, tmp_path / file, {"save_id": save_id} if save_id else None)
    index = json.loads((tmp_path / INDEX).read_text())
    if index_id:
        index["metadata"]["save_id"] = index_id
    (tmp_path / INDEX).write_text(json.dumps(index))
    if fine:
        assert len(values(tmp_path)) == 3
    else:
        message = refusal(tmp_path)
        assert "of different saves" in message
        assert all(shard in message for shard in SHARDS)
