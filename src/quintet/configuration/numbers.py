"""Numbers of inputs: the range of a float, and JSON's spelling of non-finite ones.

Transformers writes {"__float__": "Infinity"}.
"""

import math
import sys
from typing import Any, TypeGuard

TAG = "__float__"
NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a number that a float can be: integers of a file have any size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def encoded(value: Any) -> Any:
    """Replace non-finite numbers, at any depth, by mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(item) for item in value]
    return value


def decoded(value: Any) -> Any:
    """Replace such mappings by numbers."""
    if isinstance(value, dict):
        if value.keys() == {TAG} and isinstance(value[TAG], str) and value[TAG] in NUMBERS:
            return NUMBERS[value[TAG]]
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value
