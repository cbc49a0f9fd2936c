"""Truncation and padding."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from quintet.errors import InputError, shown
from quintet.tokenization.options import Side, check_choice
from quintet.tokenization.rows import TokenizedRow

# A row is made as long as that, whatever its text.
MOST_PADDED = 2**24


class LongTextWarning(UserWarning):
    """A text exceeds the model's length."""


class LongTexts:
    """Warns once of texts beyond the model's length."""

    def __init__(self) -> None:
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Forget whether a warning was given."""
        return {"_warned": False}

    def check(self, lengths: Iterable[int], limit: int) -> None:
        """Warn of the first row over a limit; 0 means none."""
        if self._warned or not limit:
            return
        longest = max(lengths, default=0)
        if longest > limit:
            self._warned = True
            warnings.warn(
                f"a text has {longest} tokens and model_max_length is {limit}, so the model was "
                "not made for it; cut it with truncation=True, or set model_max_length",
                LongTextWarning,
                stacklevel=4,
            )


def check_whole(**given: object) -> None:
    """Check that lengths are whole numbers, or None.

    Raises:
        InputError: one is something else.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, SupportsIndex):
            raise InputError(f"{name}={shown(value)} has to be a whole number")


def padding_strategy(given: bool | str | None) -> str:
    """Return the padding strategy's name, given a name or bool."""
    return given if isinstance(given, str) else "longest" if given else "do_not_pad"


def truncation_strategy(given: bool | str | None) -> str:
    """Return the truncation strategy's name, given a name or bool."""
    return given if isinstance(given, str) else "longest_first" if given else "do_not_truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """The truncation of long rows."""

    strategy: str
    max_length: int
    side: Side
    stride: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 0:
            raise InputError(f"max_length={self.max_length} has to be at least 0")
        if self.stride < 0:
            raise InputError(f"stride={self.stride} has to be at least 0")

    def apply(self, row: TokenizedRow, *, overflow: bool) -> list[TokenizedRow]:
        """Truncate a row; with `overflow`, also return the windows of the rest.

        Raises:
            InputError: the strategy cannot make the row short enough.
        """
        excess = len(row) - self.max_length
        if excess <= 0:
            return [row]
        text, pair = row.sequence_lengths()
        room = self.max_length - (len(row) - text - pair)
        if room < 0:
            raise InputError(
                f"max_length={self.max_length} has no room for the {len(row) - text - pair} "
                "tokens added around every text; raise it, or pass add_special_tokens=False"
            )
        new_text, new_pair = self._shares(text, pair, room)
        if overflow and new_text < text and new_pair < pair:
            raise InputError(
                "return_overflowing_tokens with a pair needs truncation='only_first' or "
                "'only_second', so that one of the two stays whole"
            )
        rows = row.windows(self._windows(text, new_text), self._windows(pair, new_pair))
        return rows if overflow else rows[:1]

    def _shares(self, text: int, pair: int, room: int) -> tuple[int, int]:
        """Return the number of tokens that each sequence keeps."""
        if self.strategy == "longest_first":
            if not pair:
                return room, 0
            short, long = min(text, pair), max(text, pair)
            long = short if short > room else max(short, room - short)
            if short + long > room:
                short = room // 2
                long = short + room % 2
            return (short, long) if text <= pair else (long, short)
        excess = text + pair - room
        cut = text if self.strategy == "only_first" else pair
        if cut < excess:
            which = self.strategy.removeprefix("only_")
            raise InputError(
                f"truncation={self.strategy!r} has to remove {excess} tokens to reach "
                f"max_length={self.max_length}, but the {which} sequence has {cut}"
            )
        return (text - excess, pair) if self.strategy == "only_first" else (text, pair - excess)

    def _windows(self, length: int, size: int) -> list[range]:
        """Return the kept window, then the windows that cover the rest."""
        if size >= length:
            return [range(length)]
        if size == 0:
            return [range(0)]
        if self.stride >= size:
            raise InputError(
                f"stride={self.stride} has to be less than the {size} tokens a row has room for"
            )
        windows = []
        step = size - self.stride
        if self.side == "right":
            for start in range(0, length, step):
                windows.append(range(start, min(start + size, length)))
                if windows[-1].stop == length:
                    break
        else:
            for stop in range(length, 0, -step):
                windows.append(range(max(stop - size, 0), stop))
                if windows[-1].start == 0:
                    break
        return windows


def pad_target(
    lengths: Sequence[int], strategy: str, max_length: int | None, multiple: int | None
) -> int | None:
    """Return the padded length, or None.

    Raises:
        InputError: the strategy is unknown, or lacks its length.
    """
    check_choice("padding", strategy, ("do_not_pad", "longest", "max_length"))
    if strategy == "do_not_pad":
        return None
    if strategy == "max_length":
        if max_length is None:
            raise InputError(
                "padding='max_length' needs max_length=…, as this tokenizer has no model_max_length"
            )
        if max_length > MOST_PADDED:
            raise InputError(
                f"padding='max_length' makes rows of max_length={shown(max_length)} tokens; give a "
                f"max_length of at most {MOST_PADDED}"
            )
        target = max_length
    else:
        target = max(lengths, default=0)
    if multiple is not None:
        if not isinstance(multiple, int) or not 1 <= multiple <= MOST_PADDED:
            raise InputError(
                f"pad_to_multiple_of={shown(multiple)} has to be an integer of at least 1 and at "
                f"most {MOST_PADDED}"
            )
        target = -(-target // multiple) * multiple
    return target
