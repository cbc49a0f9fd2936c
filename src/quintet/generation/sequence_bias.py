"""Parses `sequence_bias`, without torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quintet.errors import InputError, shown

Biases = Mapping[tuple[int, ...], float] | Sequence[Sequence[Sequence[int] | float]]
_RULE = "has to map sequences of token ids to numbers, as {(10, 45): -2.0} or [[[10, 45], -2.0]]"


def read_biases(given: Any, name: str = "sequence_bias") -> dict[tuple[int, ...], float]:
    """Return the bias of each sequence.

    Raises:
        InputError: it is no such mapping, a bias is NaN or +inf, or one sequence has two.
    """
    try:
        pairs = list(given.items()) if isinstance(given, Mapping) else [(a, b) for a, b in given]
        read = [(tuple(ids), float(bias)) for ids, bias in pairs]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}={shown(given)} {_RULE}") from None
    found: dict[tuple[int, ...], float] = {}
    for ids, bias in read:
        if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"{name}={shown(given)} {_RULE}; {shown(ids)} is no such sequence")
        if not bias < math.inf:
            raise InputError(
                f"{name} gives {list(ids)} the bias {bias}; it has to be a number, or -inf"
            )
        if found.setdefault(ids, bias) != bias:
            raise InputError(
                f"{name} gives {list(ids)} two biases, {found[ids]} and {bias}; leave one out"
            )
    return found
