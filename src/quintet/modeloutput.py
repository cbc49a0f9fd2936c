"""What a call returns: fields by name, by key, or by place among those that are set."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

__all__ = ["ModelOutput"]


class ModelOutput(Mapping[str, Any]):
    """A dataclass that also indexes like a tuple (`out[0]`) and a dict (`out["logits"]`).

    Fields that are None do not count: they have no place, and are not among the keys.
    """

    def __getitem__(self, key: Any) -> Any:
        """Return a field by name, or by place (an int or a slice)."""
        if isinstance(key, str):
            return dict(self._set_fields())[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._set_fields())

    def __len__(self) -> int:
        return len(self._set_fields())

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, in order."""
        return tuple(value for _, value in self._set_fields())

    def _set_fields(self) -> list[tuple[str, Any]]:
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in pairs if value is not None]
