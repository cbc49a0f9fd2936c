"""The budget of a chat template: steps, time, and memory.

Everything is counted before it is made, and what was made is never given back: the count is the
most that can be alive. A character stands for the four bytes that the widest takes.
"""

import time
from collections.abc import ItemsView, Iterator, KeysView, Set, Sized, ValuesView
from typing import Any

MAX_STEPS = 1_000_000
MAX_SECONDS = 0.8
MAX_CHARACTERS = 16 * 1024 * 1024

# In characters: a place in a list; a small object with its place; the longest form in which one
# character is written inside of a list or dict (`\U0001f600`).
POINTER = 2
ITEM = 20
QUOTED = 10
_COLLECTIONS = (list, tuple, dict, Set, KeysView, ValuesView, ItemsView)


class BudgetError(Exception):
    """A template exceeded its budget."""


class Budget:
    """The budget of one rendering.

    Every method raises BudgetError when there is nothing left.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self._next_look = 0
        # The clock of the thread: a busy machine must not fail an honest template.
        self._deadline = time.thread_time() + MAX_SECONDS

    def take(self, steps: int, characters: int = 0) -> None:
        """Spend part of the budget."""
        self.steps += steps
        self.characters += characters
        if self.steps > MAX_STEPS:
            raise BudgetError(f"more than {MAX_STEPS} steps")
        if self.characters > MAX_CHARACTERS:
            raise BudgetError(f"more than {MAX_CHARACTERS} characters")
        if self.steps >= self._next_look or characters > 1024:
            self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        """Raise if time is over."""
        self._next_look = self.steps + 64
        if time.thread_time() > self._deadline:
            raise BudgetError(f"more than {MAX_SECONDS} seconds")

    def room(self, characters: int) -> None:
        """Raise if a result would not fit."""
        if self.characters + characters > MAX_CHARACTERS:
            raise BudgetError(f"more than {MAX_CHARACTERS} characters")
        if characters > 1024:
            self.look_at_the_clock()

    def number(self, value: Any, most: int = 100_000) -> int:
        """Return a width or count as a number, else 0."""
        if not isinstance(value, int):
            return 0
        if abs(value) > most:
            raise BudgetError(f"a number beyond {most}")
        return max(value, 0)

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        """Count an iterator's items as they are taken."""
        for item in items:
            self.take(1, POINTER)
            yield item

    def text(self, value: Any) -> int:
        """Bound the length of a value's text."""
        return len(value) if isinstance(value, str) else self.weigh(value)

    def weigh(self, value: Any, *, a_character: int = QUOTED, indent: int = 0) -> int:
        """Bound the total length of a value, and raise if it is too large.

        What comparing, hashing and sorting look at is never more. A list within itself many
        times counts as often.

        Args:
            value: anything; what is in it is counted, level by level.
            a_character: the longest form of one character of a text.
            indent: how many characters stand before an item, for each level.
        """
        total = depth = 0
        level = [value]
        while level:
            total += len(level) * (ITEM + depth * indent)
            below: list[Any] = []
            for one in level:
                if isinstance(one, str):
                    total += len(one) * a_character
                elif isinstance(one, int):
                    total += 2 * one.bit_length()
                elif isinstance(one, float):
                    # `%f` writes every digit of it.
                    total += 330
                elif isinstance(one, _COLLECTIONS):
                    self.room(total + ITEM * (len(below) + len(one)))
                    below += one
                    if isinstance(one, dict):
                        below += one.values()
            self.room(total)
            level = below
            depth += 1
        return total


def size(value: Any) -> int:
    """Return the length of a collection, else 0."""
    return len(value) if isinstance(value, Sized) else 0
