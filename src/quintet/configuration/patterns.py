"""Regular expressions in files: only those that match in bounded time are taken."""

import re

MAX_LENGTH = 10_000
# Each tries as many places as a path has, for each place of the others.
MAX_REPETITIONS = 4
# Paths have few digits in a row, and so few places to try.
MAX_NUMBERS = 10
# Of alternatives in groups, and of what may be there or not, all combinations may be tried.
MAX_WAYS = 1024
PLAIN = (
    f"plain regular expression (at most {MAX_REPETITIONS} repetitions, none of a group, and few "
    "alternatives)"
)
_NUMBERS = re.compile(r"(?:\\d|\[0-9\]|\[\\d\])(?:[*+]|\{\d*,?\d*\})\??")
# How groups begin that are more than a group.
_BEGIN = re.compile(r"\(\?(?:P?<\w+>|<?[=!:])")


def is_plain(text: str) -> bool:
    """Return whether a text is a regular expression that matches a path in bounded time.

    That is one without repeated groups, and with few repetitions and choices in each alternative.
    """
    if len(text) > MAX_LENGTH:
        return False
    rest, numbers = _NUMBERS.subn("_", text)
    letters = re.sub(r"\[[^\]]*\]", "_", re.sub(r"\\.", "_", rest))
    if numbers > MAX_NUMBERS or re.search(r"\)[*+{]|[*+}][*+{]", letters):
        return False
    # What makes a repetition take little is no choice.
    simple = re.sub(r"([*+}?])\?", r"\1", _BEGIN.sub("(", letters))
    # One alternative is tried after the other.
    for one in _alternatives(simple):
        if len(re.findall(r"[*+{]", one)) > MAX_REPETITIONS or _ways(one) > MAX_WAYS:
            return False
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _alternatives(text: str) -> list[str]:
    """Cut a regular expression at each "|" that is in no group."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _ways(text: str) -> int:
    """Return the number of combinations of grouped alternatives and optional parts."""
    ways, groups = 2 ** min(text.count("?"), 64), [1]
    for letter in text:
        if letter == "(":
            groups.append(1)
        elif letter == "|":
            groups[-1] += 1
        elif letter == ")" and len(groups) > 1:
            ways *= groups.pop()
    return int(ways)
