"""Lengths of a training: in steps, in tokens, or as a share of the whole."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from quintet.configuration.numbers import is_finite
from quintet.training.progress import Progress
from quintet.training.settings import SettingError

_RULE = 'has to be a length of a training: a share as 0.1, or "2000 steps", "1.5B tokens", "10 %"'
_SIZES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}
_WRITTEN = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?(?:e\d+)?)\s*([kKMBT]?)\s*(steps?|tokens?|%)\s*")


@dataclass(frozen=True, slots=True)
class Span:
    """From the beginning of a training up to here, or so much of it.

    Attributes:
        length: how many steps or tokens, or which share, 0 to 1.
        unit: what is counted.
    """

    length: float
    unit: Literal["steps", "tokens", "share"] = "share"

    def of(self, progress: Progress) -> float:
        """Return the progress of the training in this unit."""
        match self.unit:
            case "steps":
                return float(progress.step)
            case "tokens":
                return float(progress.tokens)
            case "share":
                return progress.done


def span(value: float | str, key: str) -> Span:
    """Parse a span: a share (0 to 1), "2000 steps", "1.5B tokens" or "3 %".

    Raises:
        SettingError: it is none of these.
    """
    found: Span | None = None
    if isinstance(value, str):
        found = _read(value)
    elif is_finite(value):
        found = Span(float(value))
    if found is None or not 0 <= found.length < math.inf:
        raise SettingError.value(key, value, _RULE)
    if found.unit == "share" and found.length > 1:
        raise SettingError.value(
            key,
            value,
            f'is a share of the training, at most 1; of steps, write "{found.length:g} steps"',
        )
    return found


def _read(text: str) -> Span | None:
    written = _WRITTEN.fullmatch(text)
    if written is None:
        return None
    number = float(written[1].replace(",", "").replace("_", "")) * _SIZES[written[2]]
    match written[3][0]:
        case "s":
            return Span(number, "steps")
        case "t":
            return Span(number, "tokens")
        case _:
            return None if written[2] else Span(number / 100)
