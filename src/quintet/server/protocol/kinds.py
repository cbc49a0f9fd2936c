"""Objects that say of what kind they are, in lists that hold several kinds."""

from collections.abc import Mapping
from typing import Any

from pydantic import BeforeValidator, Discriminator

from quintet.errors import shown


def by_type(default: str = "", **others: str) -> Discriminator:
    """Return what tells the members of a union apart, by the type that an object says it has.

    Tags begin with a slash, as keys of requests do not: places in a request are told without them.

    Args:
        default: the type of an object that says none.
        others: types that share a member with another, by their own name.
    """

    def tag(value: Any) -> str:
        said = value.get("type") if isinstance(value, dict) else vars(value)["type"]
        said = default if said is None else said
        return f"/{others.get(said, said)}" if isinstance(said, str) else "/"

    return Discriminator(tag)


def only(
    what: str, *kinds: str, default: str = "", remedies: Mapping[str, str] | None = None
) -> BeforeValidator:
    """Return the check that a value is an object of one of these types; any other is named.

    Args:
        what: it is, for errors.
        kinds: the types.
        default: the type of an object that says none.
        remedies: what to do about types that cannot be had.
    """

    def known(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{what} has to be an object")
        said = value.get("type")
        said = default if said is None else said
        if said not in kinds:
            remedy = remedies.get(said) if remedies and isinstance(said, str) else None
            others = f"the types of {what} are {', '.join(kinds)}"
            raise ValueError(f"the type {shown(said)} cannot be had here; {remedy or others}")
        return value

    return BeforeValidator(known)
