"""The metadata of a GGUF file, key by key, each of the kind that it has to be."""

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from quintet.errors import CheckpointError, UnsupportedModelError, shown
from quintet.gguf.cursor import Value


class Values:
    """Metadata, read by the kind of each key; with a prefix for an architecture's keys.

    Every reader returns `default` where there is no such key.

    Raises:
        CheckpointError: a value is of another kind.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], prefix: str = "") -> None:
        self.path, self.metadata, self.prefix = path, metadata, prefix

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def needed(self, key: str) -> int:
        """Return a whole number that has to be there."""
        found = self.integer(key)
        if found is None:
            raise CheckpointError(
                f"{self.path} has no {self.prefix + key}, which says what the model is; the file "
                "is incomplete, or of a converter that leaves it out: fetch another"
            )
        return found

    def integer(self, key: str, default: int | None = None) -> int | None:
        """Return a whole number; one for each layer counts where all are equal."""
        value = self._one(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """Return a number; of one in 32 bits, as many digits as that has."""
        value = self._one(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(key, "a number")
        return float(f"{value:.7g}")

    def truth(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.metadata.get(self.prefix + key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a text."""
        value = self.metadata.get(self.prefix + key, default)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def texts(self, key: str) -> Sequence[str] | None:
        """Return a list of texts; None without one."""
        value = self.metadata.get(self.prefix + key)
        if value is not None and not isinstance(value, list):
            self.refuse(key, "a list of texts")
        return value

    def integers(self, key: str) -> Sequence[int] | None:
        """Return a list of whole numbers; None without one."""
        value = self.metadata.get(self.prefix + key)
        if value is None:
            return None
        if not isinstance(value, array) or value.typecode in "fd":
            self.refuse(key, "a list of whole numbers")
        return [int(number) for number in value]

    def refuse(self, key: str, rule: str) -> NoReturn:
        """Raise the error of a value that breaks a rule."""
        raise CheckpointError(
            f"{self.path}: {self.prefix + key}={shown(self.metadata[self.prefix + key])} has to be "
            f"{rule}"
        )

    def _one(self, key: str) -> Value | None:
        value = self.metadata.get(self.prefix + key)
        if not isinstance(value, array):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModelError(
                f"{self.path}: {self.prefix + key} has {len(set(value))} values for "
                f"{len(value)} layers, {shown(list(value[:8]))} …; models whose layers differ "
                "in it are not here"
            )
        found: Value = value[0]
        return found
