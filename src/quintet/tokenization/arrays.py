"""Converts arrays and tensors to lists, without importing their libraries."""

from typing import Any, Protocol, runtime_checkable

from quintet.errors import InputError, shown


@runtime_checkable
class _Array(Protocol):
    def tolist(self) -> Any: ...


def as_lists(value: Any) -> Any:
    """Convert arrays and tensors, nested or not, to lists."""
    if isinstance(value, list | tuple):
        return [one if type(one) is int else as_lists(one) for one in value]
    return value.tolist() if isinstance(value, _Array) else value


def as_ids(value: Any) -> list[Any]:
    """Return token ids as a list, and rows of them as a list of lists.

    Raises:
        InputError: these are not ids.
    """
    ids = as_lists(value)
    if type(ids) is int:
        ids = [ids]
    if not isinstance(ids, list):
        raise InputError(
            f"token ids have to be integers, not {type(value).__name__}: {shown(value)}"
        )
    rows = ids if ids and isinstance(ids[0], list) else [ids]
    for row in rows:
        if not isinstance(row, list):
            raise InputError(f"rows of token ids and {shown(row)} do not go together")
        for index in row:
            if type(index) is not int:
                raise InputError(
                    f"token ids have to be integers, not {type(index).__name__}: {shown(index)}"
                )
            if not 0 <= index < 2**32:
                raise InputError(f"{index} is not a token id; replace padding such as -100 first")
    return ids
