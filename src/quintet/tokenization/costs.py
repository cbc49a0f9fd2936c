"""Upper bounds on the length of results of everything a template may call.

What is not in these tables, a template cannot reach. Each entry takes what the filter or method
itself takes, and returns an upper bound; it uses up steps where a call is slow for its size.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quintet.tokenization.budget import ITEM, POINTER, Budget, BudgetError, size

# (the budget, then what the filter or method takes) -> characters
Cost = Callable[..., int]

# The longest lower or upper case, and the longest form in a URL, with its list, of a character.
CASED = 3
IN_URL = 24
# Escaping in texts that were marked as safe, or are to be: `&#34;`.
ESCAPED = 6
# Of `json.dumps`: `\u0000`; with ensure_ascii, two of these for four bytes.
IN_JSON = 6
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


# -- shapes of costs --------------------------------------------------------------------------


def _nothing(budget: Budget, *args: Any, **kwargs: Any) -> int:
    return 0


def _text(budget: Budget, value: Any) -> int:
    return budget.text(value)


def _cased(budget: Budget, value: Any) -> int:
    return CASED * budget.text(value)


def _compared(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    budget.room(budget.weigh(value, a_character=1))
    return ITEM * size(value)


def _padded(budget: Budget, value: Any, width: int = 80, fillchar: str = " ") -> int:
    return max(budget.text(value), budget.number(width))


def _trimmed(budget: Budget, value: Any, chars: str | None = None) -> int:
    length = budget.text(value)
    budget.take((length * (size(chars) or 1)) >> 10)
    return length


def _replaced(budget: Budget, text: Any, old: Any, new: Any, count: int | None = -1) -> int:
    length = budget.text(text)
    if not isinstance(text, str) or not isinstance(old, str):
        # Both are written down first; of what comes then, no more than this can be found.
        places = length + 1
    else:
        places = text.count(old)
    if isinstance(count, int) and count >= 0:
        places = min(places, count)
    return length + budget.text(old) + places * budget.text(new)


# -- formats ----------------------------------------------------------------------------------

_SPEC = re.compile(r"[#0\- +]*(\*|[0-9]+)?(?:\.(\*|[0-9]*))?[hlL]?")


def format_width(budget: Budget, spec: str) -> int:
    """Bound the width of a field of `str.format` by its format alone."""
    return sum(_number(budget, digits) for digits in re.findall(r"\d+", spec))


def percent(budget: Budget, form: str, values: Any) -> int:
    """Bound the length of `form % values`."""
    given = list(values) if isinstance(values, tuple) else [values]
    if isinstance(values, Mapping):
        given += values.values()
    text = max((budget.text(value) for value in given), default=0)
    quoted = max((budget.weigh(value) for value in given), default=0)
    starred = max((budget.number(value) for value in given), default=0)
    total = len(form)
    at = form.find("%")
    while at >= 0:
        budget.take(1)
        at = _behind_key(form, at + 1)
        spec = _SPEC.match(form, at)
        assert spec is not None
        for width in spec.groups():
            if width:
                total += starred if width == "*" else _number(budget, width)
        total += quoted if form[spec.end() : spec.end() + 1] in ("r", "a") else text
        budget.room(total)
        at = form.find("%", spec.end() + 1)
    return total


def _behind_key(form: str, at: int) -> int:
    """Return the index behind a parenthesised name, or `at`."""
    if not form.startswith("(", at):
        return at
    depth = 0
    for place in range(at, len(form)):
        depth += {"(": 1, ")": -1}.get(form[place], 0)
        if depth == 0:
            return place + 1
    return len(form)


def _number(budget: Budget, digits: str) -> int:
    if len(digits) > 6:
        raise BudgetError("a format with a width of more than six digits")
    return budget.number(int(digits))


# -- filters ----------------------------------------------------------------------------------


def _batched(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> int:
    items, width = size(value), budget.number(linecount)
    return POINTER * (items + width) + ITEM * (items // max(width, 1) + 1)


def _sliced(budget: Budget, value: Any, slices: int, fill_with: Any = None) -> int:
    return POINTER * size(value) + (ITEM + POINTER) * budget.number(slices)


def _escaped(budget: Budget, value: Any) -> int:
    return ESCAPED * budget.text(value)


def _formatted(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    budget.room(budget.text(value))
    return percent(budget, str(value), kwargs or args)


def _indented(
    budget: Budget, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> int:
    if not isinstance(s, str):
        return 0
    lines = sum(s.count(end) for end in _LINE_ENDS) + 2
    indent = len(width) if isinstance(width, str) else budget.number(width)
    return len(s) + lines * (indent + ITEM)


def _listed(budget: Budget, value: Any) -> int:
    # What is in a list is there already; letters, numbers of a range and pairs are made.
    return (POINTER if isinstance(value, list | tuple | dict) else ITEM) * size(value)


def _pairs(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    return ITEM * size(value)


def _numeric(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    # Of a text in base 32, each character is five bits.
    return size(value) + (value.bit_length() >> 4 if isinstance(value, int) else 0)


def _rounded(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> int:
    budget.number(precision, most=100)
    return _numeric(budget, value)


def _mapped(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    # The name of a filter or of an attribute, which messages of errors repeat.
    budget.room(budget.weigh(args[:1]))
    return 0


def _as_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> int:
    width = size(indent) + budget.number(indent) + sum(map(size, separators or ()))
    return budget.weigh(value, a_character=IN_JSON, indent=width)


def _truncated(budget: Budget, s: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * size(s) + sum(map(size, [*args, *kwargs.values()]))


def _in_url(budget: Budget, value: Any) -> int:
    return budget.weigh(value, a_character=IN_URL)


def _words(budget: Budget, value: Any) -> int:
    return (ITEM // 2) * budget.text(value)


# Not for chat, and not here: they run regular expressions over the text, are random, or read
# objects. `join` and `sum` know what they do themselves.
FILTERS: dict[str, Cost] = {
    **dict.fromkeys(["attr", "count", "d", "default", "first", "join"], _nothing),
    **dict.fromkeys(["last", "length", "sum"], _nothing),
    **dict.fromkeys(["abs", "float", "int"], _numeric),
    **dict.fromkeys(["map", "reject", "rejectattr", "select", "selectattr"], _mapped),
    **dict.fromkeys(["capitalize", "lower", "title", "upper"], _cased),
    **dict.fromkeys(["e", "escape", "forceescape"], _escaped),
    **dict.fromkeys(["dictsort", "groupby", "max", "min", "sort", "unique"], _compared),
    **dict.fromkeys(["list", "reverse"], _listed),
    **dict.fromkeys(["safe", "string"], _text),
    "batch": _batched,
    "center": _padded,
    "format": _formatted,
    "indent": _indented,
    "items": _pairs,
    "replace": _replaced,
    "round": _rounded,
    "slice": _sliced,
    "tojson": _as_json,
    "trim": _trimmed,
    "truncate": _truncated,
    "urlencode": _in_url,
    "wordcount": _words,
}

# Tests that look into what they are given; the others tell its kind.
TESTS = frozenset(
    [
        *("==", "!=", "<", "<=", ">", ">=", "eq", "ne", "lt", "le", "gt", "ge"),
        *("equalto", "lessthan", "greaterthan", "in", "lower", "upper", "filter", "test"),
    ]
)


# -- methods ----------------------------------------------------------------------------------


def _found_from_the_right(budget: Budget, text: str, needle: Any, *args: Any) -> int:
    # Python's search from the right compares every letter with every letter.
    budget.take((len(text) * max(size(needle), 1)) >> 10)
    return 0


def _parted(budget: Budget, text: str, sep: Any) -> int:
    _found_from_the_right(budget, text, sep)
    return len(text) + size(sep) + 3 * ITEM


def _split(budget: Budget, text: str, sep: Any = None, maxsplit: int = -1) -> int:
    if isinstance(sep, str) and sep:
        _found_from_the_right(budget, text, sep)
        places = text.count(sep)
    else:
        places = len(text) // 2 + 1
    if isinstance(maxsplit, int) and maxsplit >= 0:
        places = min(places, maxsplit)
    return len(text) + ITEM * (places + 1)


def _lines(budget: Budget, text: str, keepends: bool = False) -> int:
    return len(text) + ITEM * (sum(text.count(end) for end in _LINE_ENDS) + 1)


def _joined(budget: Budget, text: str, items: Iterable[Any]) -> int:
    # An iterator was made a list of by the caller, and what is not text ends in an error.
    sized = list(items) if isinstance(items, list | tuple | dict) else []
    if isinstance(items, str):
        return len(items) * (len(text) + 1)
    return sum(map(size, sized)) + len(text) * len(sized)


def _prefixed(budget: Budget, text: str, width: int) -> int:
    return max(len(text), budget.number(width))


def _searched(budget: Budget, items: Any, needle: Any, *args: Any) -> int:
    budget.room(budget.weigh(needle) + budget.weigh(items, a_character=1))
    return 0


def _copied(budget: Budget, items: Any) -> int:
    return ITEM * size(items)


def _looked_up(budget: Budget, items: Any, key: Any, default: Any = None) -> int:
    if not isinstance(key, str):
        budget.room(budget.weigh(key))
    return 0


_KINDS = (
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
    *("isnumeric", "isprintable", "isspace", "istitle", "isupper"),
)
# Not `format` and `format_map`, whose fields ask one by one.
METHODS: dict[type, dict[str, Cost]] = {
    str: {
        **dict.fromkeys(_KINDS, _nothing),
        **dict.fromkeys(["count", "endswith", "find", "index", "startswith"], _nothing),
        **dict.fromkeys(["capitalize", "casefold", "lower", "swapcase", "title", "upper"], _cased),
        **dict.fromkeys(["center", "ljust", "rjust"], _padded),
        **dict.fromkeys(["lstrip", "rstrip", "strip"], _trimmed),
        **dict.fromkeys(["partition", "rpartition"], _parted),
        **dict.fromkeys(["rfind", "rindex"], _found_from_the_right),
        **dict.fromkeys(["rsplit", "split"], _split),
        **dict.fromkeys(["removeprefix", "removesuffix"], lambda budget, text, _: len(text)),
        "join": _joined,
        "replace": _replaced,
        "splitlines": _lines,
        "zfill": _prefixed,
    },
    dict: {
        **dict.fromkeys(["items", "keys", "values"], _nothing),
        "copy": _copied,
        "get": _looked_up,
    },
    list: {"copy": _copied, "count": _searched, "index": _searched},
    tuple: {"count": _searched, "index": _searched},
}


def _made_of(budget: Budget, *args: Any, **kwargs: Any) -> int:
    budget.room(budget.weigh(args, a_character=1))
    return ITEM * 2 * (sum(map(size, args)) + len(kwargs) + 1)


def _time(budget: Budget, form: str) -> int:
    # Of a width of its own a format can make 256 times its length.
    return 256 * budget.number(len(form), most=1000)


GLOBALS: dict[str, Cost] = {
    **dict.fromkeys(["cycler", "joiner", "range"], _nothing),
    **dict.fromkeys(["dict", "namespace"], _made_of),
    "raise_exception": _text,
    "strftime_now": _time,
}
