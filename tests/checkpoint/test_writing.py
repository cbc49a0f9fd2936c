import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quintet.checkpoint import Checkpoint, save
from quintet.checkpoint.header import DTYPES
from quintet.errors import CheckpointError, InputError, SaveError


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(directory)
    read = dict(checkpoint.read(checkpoint.tensors))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(read[name]) == bits(tensor), name


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    tensors = {
        name: raw.view(dtype) if dtype != torch.bool else raw > 99 for name, dtype in DTYPES.items()
    }
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["scalar"] = torch.tensor(3.5, dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0, 7)
    tensors["ü.weight 🙂"] = torch.ones(1)
    return tensors


@pytest.mark.parametrize("size", [1, 64, 200, 1000, "5GB"])
def test_every_dtype_survives_at_every_shard_size(tmp_path: Path, size: int | str) -> None:
    tensors = every_dtype()
    paths = save(tmp_path, tensors, max_shard_size=size, metadata={"note": "ä"})
    assert sorted(path.name for path in paths) == names(tmp_path)
    assert_same(tmp_path, tensors)
    assert Checkpoint.open(tmp_path).metadata["note"] == "ä"


def test_strides_views_and_parameters_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.clone().T,
        "every other": base.clone()[::2, ::3],
        "expanded": torch.ones(1).expand(5, 3),
        "left": base[:, :3],
        "right": base[:, 3:],
        "conjugate": torch.tensor([1 + 2j]).to(torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    save(tmp_path, tensors)
    resolved = {name: t.resolve_conj().detach() for name, t in tensors.items()}
    assert_same(tmp_path, resolved)


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = every_dtype()
    (path,) = save(tmp_path / "ours", tensors)
    for name, tensor in load_file(path).items():
        assert bits(tensor) == bits(tensors[name])
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    assert_same(tmp_path / "theirs", tensors)


def test_one_file_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (save(tmp_path / d, every_dtype_fixed())[0].read_bytes() for d in "ab")
    assert first == second


def every_dtype_fixed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return every_dtype()


def test_shards_have_the_names_and_index_of_the_hub(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in (3, 1, 2)}
    save(tmp_path, tensors, max_shard_size=80)
    assert names(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 120
    assert list(index["weight_map"]) == ["w1", "w2", "w3"]
    assert index["weight_map"]["w2"] == "model-00002-of-00002.safetensors"


def test_rights_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for path in save(tmp_path / "d", {"w": torch.ones(1)}, text_files={"config.json": "{}"}):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("sizes", [("5GB", 40), (40, "5GB"), (40, 80), (80, 40), (40, 40)])
def test_a_save_over_another_leaves_only_its_own_files(
    tmp_path: Path, sizes: tuple[int | str, int | str]
) -> None:
    others = {"tokenizer.json", "adapter_model.safetensors", "model.fp16.safetensors"}
    for name in others:
        (tmp_path / name).write_text("mine")
    for number, size in enumerate(sizes):
        tensors = {f"w{i}": torch.full((10,), float(number)) for i in range(4)}
        save(tmp_path, tensors, max_shard_size=size, text_files={"config.json": str(number)})
        assert_same(tmp_path, tensors)
    count = {"5GB": 1, 40: 4, 80: 2}[sizes[1]]
    weights = [name for name in names(tmp_path) if name.startswith("model") and "fp16" not in name]
    assert len(weights) == count + (count > 1)
    assert set(names(tmp_path)) == {*others, *weights, "config.json"}
    assert (tmp_path / "config.json").read_text() == "1"
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_a_checkpoint_can_be_saved_over_itself_while_it_is_mapped(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.arange(1000.0), "b": torch.ones(5)})
    checkpoint = Checkpoint.open(tmp_path)
    mapped = dict(checkpoint.read(checkpoint.tensors))
    save(tmp_path, {"a": mapped["b"], "b": mapped["a"]})
    assert_same(tmp_path, {"a": torch.ones(5), "b": torch.arange(1000.0)})


def test_where_no_second_names_are_possible_shards_keep_the_infix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("quintet.checkpoint.disk.same_file_as", refuse)
    for number in range(3):
        tensors = {f"w{i}": torch.full((10,), float(number)) for i in range(2)}
        paths = save(tmp_path, tensors, max_shard_size=40)
        assert sorted(path.name for path in paths) == names(tmp_path)
        assert len(paths) == 3, "no older generation stays"
        assert_same(tmp_path, tensors)


# -- what is refused ---------------------------------------------------------------------------


def test_one_memory_under_two_names_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(4, 3)
    for twin in (weight, weight.T, weight[1], weight.view(torch.int32), weight.detach()):
        with pytest.raises(InputError, match="share memory") as caught:
            save(tmp_path / "d", {"embed.w": weight, "other": torch.ones(2), "head.w": twin})
        assert "'head.w'" in str(caught.value)
        assert "'embed.w'" in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, device="meta"), "without data"),
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (None, "None"),
    ],
    ids=["meta", "sparse", "complex128", "none"],
)
def test_a_tensor_without_plain_data_is_named(
    tmp_path: Path, tensor: torch.Tensor, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        save(tmp_path, {"layer.w": tensor})
    assert "'layer.w'" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"text_files": {"../config.json": ""}},
        {"text_files": {"a/b.json": ""}},
        {"text_files": {"model.safetensors": ""}},
        {"text_files": {"model.safetensors.index.json": ""}},
        {"text_files": {"undo.json": ""}},
        {"text_files": {"config.json": b""}},
        {"text_files": {"config.json": "\ud800"}},
        {"metadata": {"format": "np"}},
        {"metadata": {"save_id": "1"}},
        {"metadata": {"steps": 3}},
        {"max_shard_size": "big"},
    ],
)
def test_arguments_that_cannot_be_written_are_refused_before_anything_is(
    tmp_path: Path, arguments: dict[str, object]
) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        save(tmp_path / "d", {"w": torch.ones(1)}, **arguments)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_a_tensor_name_that_the_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for name in ("__metadata__", "\ud800"):
        with pytest.raises(InputError, match="cannot be the name of a tensor"):
            save(tmp_path, {name: torch.ones(1)})


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    for path in (tmp_path / "model", tmp_path / "model" / "sub"):
        with pytest.raises(SaveError) as caught:
            save(path, {"w": torch.ones(1)})
        assert str(path) in str(caught.value)
    assert (tmp_path / "model").read_text() == "mine"


def test_a_directory_in_the_place_of_a_text_file_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(1)}, text_files={"config.json": "1"})
    (tmp_path / "generation_config.json").mkdir()
    texts = {"config.json": "2", "generation_config.json": "2"}
    with pytest.raises(SaveError, match=r"generation_config\.json"):
        save(tmp_path, {"w": torch.zeros(1)}, text_files=texts)
    assert names(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]
    assert (tmp_path / "config.json").read_text() == "1"
    assert_same(tmp_path, {"w": torch.ones(1)})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_directory_without_rights_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError, match=str(tmp_path)):
        save(tmp_path, {"w": torch.ones(1)})


def test_what_crashed_saves_left_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "d" / ".saving-0123").mkdir(parents=True)
    (tmp_path / "d" / ".saving-0123" / "model.safetensors").write_text("half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "d" / ".saving-link").symlink_to(tmp_path / "mine")
    save(tmp_path / "d", {"w": torch.ones(1)})
    assert not (tmp_path / "d" / ".saving-0123").exists()
    assert (tmp_path / "mine" / "file").exists()


def test_a_forged_note_of_a_save_reaches_no_file_outside(tmp_path: Path) -> None:
    staging = tmp_path / "d" / ".saving-0123"
    staging.mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (staging / "model.safetensors").touch()
    for texts in ({"../victim": "evil"}, {"../victim": None}, [], {"a": 3}, {str(tmp_path): ""}):
        (staging / "undo.json").write_text(
            json.dumps({"last_step": "model.safetensors", "texts": texts})
        )
        with pytest.raises(CheckpointError, match="neither"):
            Checkpoint.open(tmp_path / "d")
        save(tmp_path / "d", {"w": torch.ones(1)})
        assert (tmp_path / "victim").read_text() == "mine"
        assert names(tmp_path / "d") == ["model.safetensors"]
        (tmp_path / "d" / "model.safetensors").unlink()
        staging.mkdir()
        (staging / "model.safetensors").touch()
