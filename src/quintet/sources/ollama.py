"""Finds Ollama's models: manifests that name layers, and blobs by digest."""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    UnsupportedModelError,
    listed,
    shown,
)
from quintet.files import read_json, read_text
from quintet.sources.found import FoundModel

PREFIX = "ollama:"
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
# A manifest is about a kilobyte; a system message may be a book.
MAX_MANIFEST = 1_000_000
MAX_TEXT = 4_000_000
_KIND = "application/vnd.ollama.image."
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def find(name: str) -> FoundModel:
    """Return the model of `ollama:NAME`, `ollama:NAME:TAG` or `ollama://HOST/NAMESPACE/NAME:TAG`.

    `OLLAMA_MODELS` says where Ollama keeps them, if it is set. Nothing is ever written there.

    Raises:
        InputError: no name that Ollama could have for a model.
        ModelNotFoundError: it has none of that name.
        CheckpointError: what it has is damaged or incomplete.
        UnsupportedModelError: it is no model in one file of GGUF.
    """
    parts = _parts(name)
    roots = [root for root in _roots() if root.is_dir()]
    for root in roots:
        manifest = root.joinpath("manifests", *parts)
        if manifest.is_file():
            return _read(root, manifest, name)
    if not roots:
        raise ModelNotFoundError(
            f"{shown(name)}: Ollama keeps no models here (looked in "
            f"{', '.join(map(str, _roots()))}); set OLLAMA_MODELS to where it does"
        )
    names = [known for root in roots for known in _names(root)]
    known = f"there are\n{listed(names)}" if names else "there is none"
    raise ModelNotFoundError(
        f"Ollama has no {shown(name.removeprefix(PREFIX))}, which `ollama pull` fetches; {known}"
    )


def names() -> Iterator[str]:
    """Yield the names of the models that Ollama keeps here, as `find` takes them."""
    for root in _roots():
        yield from _names(root)


def _parts(name: str) -> tuple[str, str, str, str]:
    """Return host, namespace, name and tag, each fit for a path."""
    text = name.removeprefix(PREFIX).removeprefix("//")
    path, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        path, tag = text, TAG
    named = path.split("/")
    host, namespace = HOST, NAMESPACE
    if len(named) == 3:
        host, *named = named
    if len(named) == 2:
        namespace, *named = named
    usable = len(named) == 1 and _HOST.fullmatch(host)
    if not usable or not all(_PART.fullmatch(part) for part in (namespace, named[0], tag)):
        raise InputError(
            f"{shown(name)} is no name of a model in Ollama: {PREFIX}NAME, {PREFIX}NAME:TAG or "
            f"{PREFIX}//HOST/NAMESPACE/NAME:TAG"
        )
    return host, namespace, named[0], tag


def _roots() -> list[Path]:
    if given := os.environ.get("OLLAMA_MODELS"):
        return [Path(given).expanduser()]
    # The second is that of the service, which runs as a user of its own.
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def _names(root: Path) -> Iterator[str]:
    """Yield the names of the models there, as `ollama list` writes them."""
    for path in sorted((root / "manifests").glob("*/*/*/*")):
        host, namespace, name, tag = path.relative_to(root / "manifests").parts
        whole = f"{host}/{namespace}/{name}:{tag}".removeprefix(f"{HOST}/")
        yield PREFIX + whole.removeprefix(f"{NAMESPACE}/")


def _read(root: Path, manifest: Path, name: str) -> FoundModel:
    layers: dict[str, list[dict[str, Any]]] = {}
    given = read_json(manifest, MAX_MANIFEST).get("layers")
    for layer in given if isinstance(given, list) else []:
        kind = layer.get("mediaType") if isinstance(layer, dict) else None
        if not isinstance(kind, str):
            raise CheckpointError(f"{manifest} has a layer without a mediaType")
        layers.setdefault(kind.partition(";")[0].removeprefix(_KIND), []).append(layer)
    if "tensor" in layers:
        raise UnsupportedModelError(
            f"{shown(name)} is kept by Ollama as {len(layers['tensor'])} single tensors, not in "
            "GGUF; load the release it was made from"
        )
    if "adapter" in layers:
        kept = [*layers.get("model", ()), *layers["adapter"]]
        model, *adapters = [str(_blob(root, layer, manifest)) for layer in kept]
        raise UnsupportedModelError(
            f"{shown(name)} is a model with adapters; load {model} and put on it, by load_adapter "
            f"or --adapter,\n{listed(adapters)}"
        )
    models = layers.get("model", [])
    if len(models) != 1:
        raise CheckpointError(
            f"{manifest} names {len(models)} files of weights; one is what can be read"
        )
    if "projector" in layers:
        warnings.warn(
            f"{shown(name)} can take pictures or sound in Ollama; here it reads text alone",
            stacklevel=4,
        )
    system = [_blob(root, layer, manifest) for layer in layers.get("system", ())]
    params = [_blob(root, layer, manifest) for layer in layers.get("params", ())]
    return FoundModel(
        _blob(root, models[0], manifest),
        system=read_text(system[-1], MAX_TEXT) if system else None,
        parameters=read_json(params[-1], MAX_TEXT) if params else {},
    )


def _blob(root: Path, layer: dict[str, Any], manifest: Path) -> Path:
    """Return the path of a layer's content, if it has the manifest's size."""
    digest, size = layer.get("digest"), layer.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int:
        raise CheckpointError(
            f"{manifest} has a layer with digest={shown(digest)} and size={shown(size)}; they "
            "have to be sha256:<64 digits> and a number of bytes"
        )
    # Old installations have the colon.
    names = (digest.replace(":", "-"), digest)
    found = [path for name in names if (path := root / "blobs" / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{root / 'blobs' / names[0]} is missing, which {manifest} names; `ollama pull` "
            "fetches it again"
        )
    stored_size = found[0].stat().st_size
    if stored_size != size:
        raise CheckpointError(
            f"{found[0]} has {stored_size} bytes, not the {size} of {manifest}; `ollama pull` "
            "fetches it again"
        )
    return found[0]
