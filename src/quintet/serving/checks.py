"""Checks of the numbers that an engine is given."""

import math
import sys

from quintet.errors import InputError, shown


def check_count(name: str, value: object, least: int | None = None) -> None:
    """Check a whole number.

    Raises:
        InputError: it is none, or below its least.
    """
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f", {least} at least"
        raise InputError(f"{name}={shown(value)} has to be a whole number{bound}")


def check_duration(name: str, value: object, unit: str = "seconds", *, zero: bool = False) -> None:
    """Check a length of time, which may be infinite.

    Args:
        name: what it is called.
        value: the number.
        unit: what it counts.
        zero: whether there may be no time at all.

    Raises:
        InputError: it is no number, or no length of time.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    finite = number <= sys.float_info.max or number == math.inf
    if not finite or not (number >= 0 if zero else number > 0):
        least = "not below" if zero else "above"
        raise InputError(f"{name}={shown(value)} has to be a number of {unit}, {least} 0")
