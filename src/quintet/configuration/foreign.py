"""Configurations of other libraries, read through their `to_dict`."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class _Describing(Protocol):
    def to_dict(self) -> Mapping[str, Any]: ...


def described(config: object) -> Mapping[str, Any] | None:
    """Return the mapping of another library's config, or None."""
    if isinstance(config, Mapping):
        return config
    if isinstance(config, type) or not isinstance(config, _Describing):
        return None
    return config.to_dict()
