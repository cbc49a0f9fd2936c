"""Opens the weights that `locate` finds: safetensors or GGUF."""

from pathlib import Path

from quintet.checkpoint.gguf import GGUFCheckpoint
from quintet.checkpoint.reading import Checkpoint
from quintet.errors import InputError


def open_weights(root: Path, *, variant: str | None = None) -> Checkpoint | GGUFCheckpoint:
    """Open the weights in a directory, or those of a GGUF file.

    Raises:
        CheckpointError: they are incomplete or damaged.
        InputError: a variant of a GGUF file, of which each is one by itself.
    """
    if not root.is_file():
        return Checkpoint.open(root, variant=variant)
    if variant is not None:
        raise InputError(f"variant={variant!r}: {root} is one file; name the other one instead")
    return GGUFCheckpoint.open(root)
