"""Configurations of other libraries, which say what they are by a dict."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class _Describing(Protocol):
    def to_dict(self) -> Mapping[str, Any]: ...


def described(config: object) -> Mapping[str, Any] | None:
    """Return what a configuration says, one of Transformers for example; None if it cannot."""
    if isinstance(config, Mapping):
        return config
    if isinstance(config, type) or not isinstance(config, _Describing):
        return None
    return config.to_dict()
