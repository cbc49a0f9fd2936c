"""Where the weights of a checkpoint lie: the names of its files, and which paths are safe."""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from quintet.errors import CheckpointError, InputError
from quintet.hub import SINGLE_WEIGHTS, WEIGHTS_INDEX, with_variant

__all__ = [
    "FINAL_INDEX",
    "INDEX",
    "REPLACED",
    "SAVE_ID",
    "SINGLE",
    "STAGING",
    "UNDO",
    "Names",
    "find",
    "is_last_step",
    "is_plain",
]

SINGLE = SINGLE_WEIGHTS
INDEX = WEIGHTS_INDEX
# Temporary directories of saves, and in them: the note that says how to take one back, the
# weights that it replaced, and the index for when the infixes are out of the shards' names.
STAGING = ".saving-"
UNDO = "undo.json"
REPLACED = "replaced"
FINAL_INDEX = "final.index.json"
# One save writes one random value under this key into all its shards and their index.
SAVE_ID = "save_id"


@dataclass(frozen=True, slots=True)
class Names:
    """What the files of weights are called, with a variant in each: `model.fp16.safetensors`.

    Raises:
        InputError: the variant cannot be a part of a file's name.
    """

    variant: str | None = None

    def __post_init__(self) -> None:
        if self.variant is not None and not re.fullmatch(r"\w[\w-]*", self.variant):
            raise InputError(f"variant={self.variant!r} has to be a word such as 'fp16'")

    @property
    def single(self) -> str:
        """The one file."""
        return with_variant(SINGLE, self.variant)

    @property
    def index(self) -> str:
        """The index of shards."""
        return with_variant(INDEX, self.variant)

    def shard(self, number: int, count: int) -> str:
        """Return the name of shard `number`, counted from 1, of `count`."""
        return f"{self._stem}-{number:05}-of-{count:05}.safetensors"

    def is_shard(self, name: str) -> bool:
        """Tell whether a name is that of a shard, also while a save replaces one of that name."""
        rest = r"-\d{5,}-of-\d{5,}(\.[0-9a-f]{16})?\.safetensors"
        return re.fullmatch(re.escape(self._stem) + rest, name) is not None

    @property
    def _stem(self) -> str:
        return "model" if self.variant is None else f"model.{self.variant}"


def is_last_step(name: object) -> bool:
    """Tell whether a name is one that the last step of a save moves."""
    pattern = r"model(\.\w[\w-]*)?\.safetensors|model\.safetensors\.index(\.\w[\w-]*)?\.json"
    return isinstance(name, str) and (name == REPLACED or re.fullmatch(pattern, name) is not None)


def is_plain(name: str) -> bool:
    """Tell whether a string is the name of a file right in a directory, on any system."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= 255 and name not in (".", "..") and not re.search(r"[/\\:\x00-\x1f]", name)


def find(directory: Path, name: str) -> Path | None:
    """Return the path of a regular file in `directory`, or None where there is no such name.

    Raises:
        CheckpointError: it is a directory or a device, or a link that leads out.
    """
    path = directory / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} has to be a regular file, and is not")
    if not any(real.is_relative_to(root) for root in _allowed(directory.resolve())):
        raise CheckpointError(
            f"{path} is a link that leads out of its directory, to {real}; "
            "put the file itself there, or open the directory that holds it"
        )
    return path


def _allowed(directory: Path) -> list[Path]:
    """Return the directories in which the files of a checkpoint may really lie."""
    # huggingface_hub: models--owner--name/snapshots/<commit>/file -> ../../blobs/<hash>
    snapshots = [folder for folder in directory.parents if folder.name == "snapshots"]
    return [directory, *(folder.parent / "blobs" for folder in snapshots)]
