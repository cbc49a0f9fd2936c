"""Checkpoints with random weights, written once and kept: the same for every contender."""

from pathlib import Path

__all__ = ["checkpoint", "model_path", "size_of", "warm"]


def checkpoint(folder: Path, geometry: str) -> Path:
    """Return the directory of a geometry's checkpoint, writing it if it is not there."""
    import torch

    from quintet.measurement.geometries import geometry as named
    from quintet.measurement.synthetic import random_model

    path = folder / geometry
    if not (path / "config.json").is_file():
        print(f"writing {path}", flush=True)
        random_model(named(geometry).config(), torch.bfloat16).save_pretrained(path)
    return path


def model_path(folder: Path, geometry: str, peer: str, weights: str) -> Path:
    """Return what a contender loads, writing it if it is not there."""
    path = checkpoint(folder, geometry)
    if peer != "llama.cpp":
        return path
    from benchmarks.gguf_files import convert

    return convert(path, folder / f"{geometry}-{weights}.gguf", weights)


def size_of(path: Path) -> int:
    """Return the bytes of a model's files."""
    return sum(file.stat().st_size for file in _weights(path))


def warm(path: Path) -> None:
    """Read a model's files once, so that loading them finds them in the page cache."""
    buffer = bytearray(2**24)
    for file in _weights(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
