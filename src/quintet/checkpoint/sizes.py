"""Shard sizes, and the distribution of tensors over shards."""

import re
from collections.abc import Mapping

from quintet.errors import InputError, shown

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*((?:[KMGT]I?)?)B", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str) -> int:
    """Return the bytes of a size such as `5GB` (10⁹), `500MiB` (2²⁰) or a plain number.

    Raises:
        InputError: it is not a size of at least one byte.
    """
    count = 0
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    if count < 1:
        raise InputError(
            f"max_shard_size={shown(size)} has to be a positive number of bytes, or text such as "
            "'5GB', '500MB' or '10MiB'"
        )
    return count


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Group names in order into parts of at most `most` bytes, or one name."""
    parts: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    return parts
