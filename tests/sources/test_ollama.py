"""Ollama's folder: manifests and blobs, read and never written, and nothing in them believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from quintet.errors import CheckpointError, InputError, ModelNotFoundError, UnsupportedModelError
from quintet.sources import FoundModel, find_gguf

KIND = "application/vnd.ollama.image."


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "ollama"
    (root / "blobs").mkdir(parents=True)
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    monkeypatch.chdir(tmp_path)
    return root


def layer(root: Path, kind: str, content: bytes, colon: bool = False) -> dict[str, Any]:
    """Store a blob and return the layer that names it."""
    digest = hashlib.sha256(content).hexdigest()
    (root / "blobs" / f"sha256{':' if colon else '-'}{digest}").write_bytes(content)
    return {"mediaType": KIND + kind, "digest": f"sha256:{digest}", "size": len(content)}


def write(root: Path, layers: list[Any], at: str = "registry.ollama.ai/library/m/latest") -> Path:
    manifest = root / "manifests" / at
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest


def found(name: str) -> FoundModel:
    answer = find_gguf(name)
    assert answer is not None
    return answer


def test_a_model_with_what_ollama_says_beside_it(root: Path) -> None:
    params = {"stop": ["<|im_end|>"], "temperature": 0.6}
    layers = [
        layer(root, "model", b"GGUF weights"),
        layer(root, "template", b"{{ .Prompt }}"),
        layer(root, "system", b"Sprich deutsch."),
        layer(root, "params", json.dumps(params).encode()),
        layer(root, "license", b"free"),
    ]
    write(root, layers)
    before = sorted(path.as_posix() for path in root.rglob("*"))
    for name in ("ollama:m", "ollama:m:latest", "ollama://m", "ollama:library/m:latest"):
        answer = found(name)
        assert answer.path.read_bytes() == b"GGUF weights"
        assert answer.system == "Sprich deutsch."
        assert answer.parameters == params
    assert sorted(path.as_posix() for path in root.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("ollama:m:1.5b", "registry.ollama.ai/library/m/1.5b"),
        ("ollama:me/m:x", "registry.ollama.ai/me/m/x"),
        ("ollama://hf.co/o/m-GGUF:Q4_K_M", "hf.co/o/m-GGUF/Q4_K_M"),
        ("ollama:localhost:5000/o/m", "localhost:5000/o/m/latest"),
    ],
)
def test_names_with_all_their_parts(root: Path, name: str, at: str) -> None:
    write(root, [layer(root, "model", b"GGUF", colon=True)], at)
    assert found(name).path.read_bytes() == b"GGUF"


def test_what_is_there_is_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, [], "registry.ollama.ai/library/qwen2.5/0.5b")
    write(root, [], "hf.co/o/m/latest")
    with pytest.raises(ModelNotFoundError, match=r"(?s)ollama:hf.co/o/m:latest.*qwen2.5:0.5b"):
        find_gguf("ollama:qwen2.5")
    monkeypatch.setenv("OLLAMA_MODELS", str(root / "gone"))
    with pytest.raises(ModelNotFoundError, match="set OLLAMA_MODELS"):
        find_gguf("ollama:m")


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/b/c/d", "m:", "m:..", "m: x", "a/../m", "/etc/passwd", "m\0", "-x", "ö"],
)
def test_names_that_would_lead_elsewhere(root: Path, name: str) -> None:
    with pytest.raises(InputError):
        find_gguf(f"ollama:{name}")


def test_damage_is_named(root: Path) -> None:
    good = layer(root, "model", b"GGUF")

    def fails(layers: list[Any], match: str) -> None:
        write(root, layers)
        with pytest.raises(CheckpointError, match=match):
            find_gguf("ollama:m")

    fails([{**good, "digest": "sha256:../../secret"}], "64 digits")
    fails([{**good, "digest": "md5:" + "0" * 64}], "64 digits")
    fails([{**good, "digest": "sha256:" + "0" * 64}], "is missing")
    fails([{**good, "size": 5}], "has 4 bytes, not the 5")
    fails([{**good, "size": "4"}], "number of bytes")
    fails([good, good], "names 2 files")
    fails([], "names 0 files")
    fails(["x"], "without a mediaType")
    fails([good, layer(root, "params", b"[1]")], "JSON object")
    fails([good, layer(root, "system", b"\xff")], "not a readable file of UTF-8 text")
    write(root, []).write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        find_gguf("ollama:m")


def test_what_is_no_model_in_one_file_is_refused_by_name(root: Path) -> None:
    write(root, [layer(root, "tensor; name=x", b"1"), layer(root, "tensor; name=y", b"2")])
    with pytest.raises(UnsupportedModelError, match="2 single tensors"):
        find_gguf("ollama:m")
    write(root, [layer(root, "model", b"GGUF"), layer(root, "adapter", b"GGUF.")])
    with pytest.raises(UnsupportedModelError, match=r"(?s)load .*sha256-.*--adapter,\n.*sha256-"):
        find_gguf("ollama:m")
    write(root, [layer(root, "model", b"GGUF"), layer(root, "projector", b"GGUF")])
    with pytest.warns(UserWarning, match="text alone"):
        find_gguf("ollama:m")
