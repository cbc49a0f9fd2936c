"""`quintet ls`: what lies on this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import quintet.cli.ls as module
from quintet.errors import OfflineError
from quintet.sources import fetch_smollm2


def test_models_in_folders(
    quintet: Any, chat_model: Path, plain_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(chat_model, tmp_path / "chat")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    result = quintet("ls", tmp_path, plain_model)
    head, *rows = (line.split() for line in result.out.splitlines())
    assert head == ["MODEL", "REVISION", "FAMILY", "WEIGHTS", "SIZE", "USED"]
    assert [row[:4] for row in rows] == [
        [str(tmp_path / "chat"), "-", "qwen2", "float32"],
        [str(plain_model), "-", "qwen2", "float32"],
    ]
    everything = json.loads(quintet("ls", tmp_path, "--all", "--json").out)
    assert [row["family"] for row in everything] == ["qwen2", "gpt2"]
    files = [path.stat().st_size for path in chat_model.iterdir()]
    assert everything[0]["size"] == sum(files)


def test_weights_in_fewer_bits_are_named(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    assert quintet("quantize", chat_model, tmp_path / "q4", "--to", "int4", "-q").code == 0
    (row,) = json.loads(quintet("ls", tmp_path / "q4", "--json").out)
    assert row["weights"].startswith("int4 by 32")


def test_where_there_is_none(quintet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no models in these folders" in quintet("ls", tmp_path).out
    refused = quintet("ls", tmp_path / "no")
    assert (refused.code, refused.out) == (3, "")
    assert "there is no folder" in refused.err
    monkeypatch.setattr(module, "in_other_programs", lambda: iter([]))
    none = quintet("ls", "--cache-dir", tmp_path)
    assert "as by `quintet chat smollm2`" in none.out


def test_files_in_gguf_and_what_other_programs_keep(
    quintet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        talks = fetch_smollm2(local_files_only=True)
    except OfflineError as error:
        pytest.skip(f"{error}; `quintet info smollm2` fetches it")
    (tmp_path / "small.gguf").symlink_to(talks)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    rows = json.loads(quintet("ls", tmp_path, "--all", "--json").out)
    assert [(row["model"], row["family"], row["weights"]) for row in rows] == [
        (f"{tmp_path}/damaged.gguf", None, "GGUF"),
        (f"{tmp_path}/small.gguf", "qwen2", "GGUF"),
    ]
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    names = [row["model"] for row in json.loads(quintet("ls", "--json").out)]
    assert "smollm2" in names
