"""Paths that cannot be, links, and folders that hold something else than a model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quintet
from quintet import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    QuintetError,
    SaveError,
    UnsupportedModelError,
)

LOADS: dict[str, Callable[..., Any]] = {
    "model": AutoModelForCausalLM.from_pretrained,
    "class": Qwen2ForCausalLM.from_pretrained,
    "config": AutoConfig.from_pretrained,
    "config-class": Qwen2Config.from_pretrained,
    "generation": GenerationConfig.from_pretrained,
    "tokenizer": AutoTokenizer.from_pretrained,
    "pipeline": lambda path, **options: quintet.pipeline("text-generation", path, **options),
}
each_load = pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
NAMES: dict[str, Any] = {
    "nul": "a\0b",
    "long": "x" * 300,
    "very-long": "x/" * 5000,
    "surrogate": "a\ud800b",
    "no-home": "~nobody-of-that-name/x",
    "empty": "",
    "none": None,
    "number": 7,
}


@each_load
@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_what_cannot_be_a_path_is_named(load: Callable[..., Any], name: str) -> None:
    with pytest.raises((InputError, ModelNotFoundError)) as found:
        load(NAMES[name])
    str(found.value).encode()
    assert len(str(found.value)) < 1000


@each_load
@pytest.mark.parametrize("name", ["nul", "long", "surrogate", "no-home"])
def test_a_cache_that_cannot_be_is_named(load: Callable[..., Any], name: str) -> None:
    if load is LOADS["pipeline"]:
        return
    with pytest.raises(InputError, match="cache_dir=") as found:
        load("owner/name", cache_dir=NAMES[name])
    str(found.value).encode()


@pytest.mark.parametrize("name", ["nul", "long", "surrogate", "no-home", "none", "number"])
def test_a_folder_to_save_in_that_cannot_be_is_named(chat_model: Path, name: str) -> None:
    model = Qwen2ForCausalLM.from_pretrained(chat_model)
    for save in (
        model.save_pretrained,
        model.config.save_pretrained,
        model.generation_config.save_pretrained,
    ):
        with pytest.raises((InputError, SaveError)) as found:
            save(NAMES[name])
        str(found.value).encode()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_directory_in_place_of_a_file(chat_model: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "model"))
    (root / name).unlink()
    (root / name).mkdir()
    with pytest.raises(QuintetError, match=name):
        AutoModelForCausalLM.from_pretrained(root)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_may_not_be_read(
    chat_model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "model"))
    opened = Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **more)

    # Tests may run as root, to whom all is open.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        AutoModelForCausalLM.from_pretrained(root)


# -- links ---------------------------------------------------------------------------------------

READ = ["config.json", "generation_config.json", "model.safetensors"]


def linked(chat_model: Path, tmp_path: Path, name: str, to: Path) -> Path:
    root = Path(shutil.copytree(chat_model, tmp_path / "linked"))
    (root / name).unlink()
    (root / name).symlink_to(to)
    return root


@pytest.mark.parametrize("name", READ)
def test_a_link_to_the_file_of_another_model_is_followed(
    chat_model: Path, tmp_path: Path, name: str
) -> None:
    AutoModelForCausalLM.from_pretrained(linked(chat_model, tmp_path, name, chat_model / name))


@pytest.mark.parametrize("name", READ)
def test_a_link_into_a_cache_of_the_hub_is_followed(
    chat_model: Path, tmp_path: Path, name: str
) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.copy(chat_model / name, repository / "blobs" / "0123")
    root = linked(chat_model, tmp_path, name, repository / "blobs" / "0123")
    AutoModelForCausalLM.from_pretrained(root)


@pytest.mark.parametrize("name", READ)
def test_a_link_to_anything_else_is_refused(chat_model: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(chat_model / name, tmp_path / name)
    shutil.copy(chat_model / name, tmp_path / "secret")
    beside = [] if name == "model.safetensors" else [tmp_path / name]
    for to in (*beside, tmp_path / "secret"):
        root = linked(chat_model, tmp_path, name, to)
        with pytest.raises(CheckpointError, match="link that leads out of its directory"):
            AutoModelForCausalLM.from_pretrained(root)
        shutil.rmtree(root)


def test_a_link_from_weights_to_weights_is_followed(chat_model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "elsewhere" / "qwen2.safetensors"
    weights.parent.mkdir()
    shutil.copy(chat_model / "model.safetensors", weights)
    AutoModelForCausalLM.from_pretrained(linked(chat_model, tmp_path, "model.safetensors", weights))


def test_a_folder_of_links_is_a_model(chat_model: Path, tmp_path: Path) -> None:
    for path in chat_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)


# -- what a folder is instead ----------------------------------------------------------------------


@each_load
def test_an_adapter_names_its_base(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for content in ({"base_model_name_or_path": "owner/base"}, {}, []):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(UnsupportedModelError, match="is an adapter") as found:
            load(tmp_path)
        assert ("'owner/base'" in str(found.value)) == bool(content)


def test_a_damaged_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "m.Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match=r"m\.Q4_K_M\.gguf is 4 bytes long"):
            AutoModelForCausalLM.from_pretrained(path)


@each_load
def test_an_empty_folder_is_named(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is empty"):
        load(tmp_path)


def test_a_file_is_no_model_and_only_a_model_is_meant(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean"):
        AutoModelForCausalLM.from_pretrained(chat_model / "model.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelNotFoundError) as found:
        AutoModelForCausalLM.from_pretrained(tmp_path / "notes.txt")
    assert "did you mean" not in str(found.value)


def test_the_tokenizer_of_an_adapter_can_be_read(chat_model: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "adapter"))
    os.remove(root / "config.json")
    (root / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    AutoTokenizer.from_pretrained(root)
    with pytest.raises(UnsupportedModelError, match="'x/y'"):
        AutoModelForCausalLM.from_pretrained(root)
