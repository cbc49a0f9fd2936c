"""The source of a model: its name, and where its files are."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quintet.hub import CONFIG_PATTERNS, locate, locate_weights


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's name and the options to locate its files."""

    name_or_path: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None
    gguf_file: str | None = None

    @property
    def where(self) -> dict[str, Any]:
        """The options to locate files, without the name."""
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "local_files_only": self.local_files_only,
            "subfolder": self.subfolder,
        }

    def locate(self, *, weights: bool = True) -> Path:
        """Return the local directory or GGUF file, downloading config and weights if needed."""
        where = {**self.where, "gguf_file": self.gguf_file}
        root = locate(self.name_or_path, CONFIG_PATTERNS, **where)
        if weights:
            root = locate_weights(self.name_or_path, self.variant, **where)
        return root
