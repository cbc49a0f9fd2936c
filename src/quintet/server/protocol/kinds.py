"""Objects with a `type`, in lists that hold several types."""

from collections.abc import Mapping
from typing import Any

from pydantic import BeforeValidator, Discriminator

from quintet.errors import shown


def by_type(default: str = "", **others: str) -> Discriminator:
    """Return a discriminator for the members of a union, by the `type` of an object.

    Tags begin with a slash, as keys of requests do not: places in a request are told without them.

    Args:
        default: the type of an object that says none.
        others: types that share a member with another, by their own name.
    """

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else vars(value)["type"]
        kind = default if kind is None else kind
        return f"/{others.get(kind, kind)}" if isinstance(kind, str) else "/"

    return Discriminator(tag)


def only(
    noun: str, *kinds: str, default: str = "", remedies: Mapping[str, str] | None = None
) -> BeforeValidator:
    """Return the check that a value is an object of one of these types; any other is named.

    Args:
        noun: it is, for errors.
        kinds: the types.
        default: the type of an object that says none.
        remedies: what to do about types that cannot be had.
    """

    def known(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{noun} has to be an object")
        kind = value.get("type")
        kind = default if kind is None else kind
        if kind not in kinds:
            remedy = remedies.get(kind) if remedies and isinstance(kind, str) else None
            others = f"the types of {noun} are {', '.join(kinds)}"
            raise ValueError(f"the type {shown(kind)} cannot be had here; {remedy or others}")
        return value

    return BeforeValidator(known)
