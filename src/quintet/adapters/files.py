"""Locates and opens an adapter's directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quintet.adapters.config import LoraConfig
from quintet.adapters.gguf import open_gguf_adapter
from quintet.checkpoint import Checkpoint, Weights, read_consistently
from quintet.errors import CheckpointError, UnsupportedModelError, shown
from quintet.folder import ADAPTER_CONFIG_NAME, AdapterFolderError
from quintet.hub import locate
from quintet.sources import is_gguf

# What the names of its files of weights begin with.
STEM = "adapter_model"
PATTERNS = (ADAPTER_CONFIG_NAME, f"{STEM}*.safetensors", f"{STEM}.safetensors.index.json")


def open_adapter(
    name_or_path: str | os.PathLike[str], values: Mapping[str, Any] | None = None, **where: Any
) -> tuple[Path, LoraConfig, Weights]:
    """Open an adapter: where it is, its config and tensors, which are read on demand.

    Args:
        name_or_path: a directory, a hub id, or what means a file in GGUF.
        values: the config of the model that it is for; None to be told of it alone.
        where: as of `quintet.hub.locate`.

    Raises:
        ModelNotFoundError: no such directory or repository.
        CheckpointError: it is none, or its files are damaged.
        UnsupportedModelError: it is of another kind, or its weights are pickled.
    """
    try:
        root = locate(name_or_path, PATTERNS, **where)
    except AdapterFolderError as found:
        # Without weights that are read here.
        root = found.path
    if is_gguf(root):
        return root, *open_gguf_adapter(root, values)
    if not (root / ADAPTER_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{shown(os.fspath(name_or_path))} has no {ADAPTER_CONFIG_NAME}; an adapter is a "
            f"directory with it and {STEM}.safetensors, or a file in GGUF"
        )

    def files() -> tuple[LoraConfig, Weights]:
        config = LoraConfig.read(root)
        pickled = root / f"{STEM}.bin"
        if pickled.is_file() and not any(root.glob(f"{STEM}*.safetensors")):
            raise UnsupportedModelError(
                f"{pickled} is pickled, which can run code and is never read; load it in PEFT, "
                "and save it with safe_serialization=True"
            )
        return config, Checkpoint.open(root, stem=STEM)

    config, weights = read_consistently(root, files, stem=STEM)
    return root, config, weights
