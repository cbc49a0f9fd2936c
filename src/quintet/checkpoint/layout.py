"""File names of weights in a directory, and which paths are safe."""

import re
from dataclasses import dataclass

from quintet.hub import SINGLE_WEIGHTS, WEIGHTS_INDEX, with_variant

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
    """The names of weight files, with an optional variant: `model.fp16.safetensors`.

    Attributes:
        variant: the word in the middle; None for none.
        stem: what they begin with: "adapter_model" for those of an adapter.

    Raises:
        InputError: the variant cannot be a part of a file's name.
    """

    variant: str | None = None
    stem: str = "model"

    def __post_init__(self) -> None:
        with_variant(SINGLE, self.variant)

    @property
    def single(self) -> str:
        """The single weights file."""
        return with_variant(f"{self.stem}.safetensors", self.variant)

    @property
    def index(self) -> str:
        """The index of shards."""
        return with_variant(f"{self.stem}.safetensors.index.json", self.variant)

    def shard(self, number: int, count: int) -> str:
        """Return the name of shard `number`, counted from 1, of `count`."""
        return f"{self._stem}-{number:05}-of-{count:05}.safetensors"

    def is_shard(self, name: str) -> bool:
        """Return whether a name is a shard's, including temporary names of a save."""
        rest = r"-\d{5,}-of-\d{5,}(\.[0-9a-f]{16})?\.safetensors"
        return re.fullmatch(re.escape(self._stem) + rest, name) is not None

    @property
    def _stem(self) -> str:
        return self.stem if self.variant is None else f"{self.stem}.{self.variant}"


def is_last_step(name: object) -> bool:
    """Return whether the last step of a save moves a file of this name."""
    word = r"(\.\w[\w-]*)?"
    pattern = rf"(adapter_)?model({word}\.safetensors|\.safetensors\.index{word}\.json)"
    return isinstance(name, str) and (name == REPLACED or re.fullmatch(pattern, name) is not None)


def is_plain(name: str) -> bool:
    """Return whether a string is a plain file name on any system."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= 255 and name not in (".", "..") and not re.search(r"[/\\:\x00-\x1f]", name)
