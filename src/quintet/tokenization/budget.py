"""What a template of a stranger may use up: steps, seconds, and characters of memory.

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
    """The template did more than a chat template has reason to."""


class Budget:
    """Counts what one rendering does, and ends it in time.

    Every method raises BudgetError when there is nothing left.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self._next_look = 0
        # The clock of the thread: a busy machine must not fail an honest template.
        self._deadline = time.thread_time() + MAX_SECONDS

    def take(self, steps: int, characters: int = 0) -> None:
        """Use up some of it."""
        self.steps += steps
        self.characters += characters
        if self.steps > MAX_STEPS:
            raise BudgetError(f"more than {MAX_STEPS} steps")
        if self.characters > MAX_CHARACTERS:
            raise BudgetError(f"more than {MAX_CHARACTERS} characters")
        if self.steps >= self._next_look or characters > 1024:
            self.look_at_the_clock()

    def look_at_the_clock(self) -> None:
        """End the rendering if its time is over."""
        self._next_look = self.steps + 64
        if time.thread_time() > self._deadline:
            raise BudgetError(f"more than {MAX_SECONDS} seconds")

    def room(self, characters: int) -> None:
        """Refuse what would not fit, before it is made."""
        if self.characters + characters > MAX_CHARACTERS:
            raise BudgetError(f"more than {MAX_CHARACTERS} characters")
        if characters > 1024:
            self.look_at_the_clock()

    def number(self, value: Any, most: int = 100_000) -> int:
        """Return a width or a count as a number, 0 if it is none."""
        if not isinstance(value, int):
            return 0
        if abs(value) > most:
            raise BudgetError(f"a number beyond {most}")
        return max(value, 0)

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        """Count what an iterator yields, as it is taken."""
        for item in items:
            self.take(1, POINTER)
            yield item

    def text(self, value: Any) -> int:
        """Bound the length of a value's text."""
        return len(value) if isinstance(value, str) else self.weigh(value)

    def weigh(self, value: Any, *, a_character: int = QUOTED, indent: int = 0) -> int:
        """Bound the length of a value when all of it is written down, refusing too much.

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
    """Count the items of a value, 0 if it is no collection."""
    return len(value) if isinstance(value, Sized) else 0
