"""Filters, tests and functions that templates may call, within the budget."""

import datetime
import json
import string
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
import jinja2.tests
import jinja2.utils
import markupsafe

from quintet.errors import shown
from quintet.tokenization import costs
from quintet.tokenization.budget import POINTER, Budget, BudgetError, size

Function = Callable[..., Any]

# Filters that go through all of what they are given, and count it.
_ITERATED = frozenset(
    (
        *("batch", "groupby", "join", "list", "max", "min", "reverse", "slice", "sort", "sum"),
        "unique",
    )
)


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment with a budget."""

    def __init__(self, **options: Any) -> None:
        self.budget = Budget()
        super().__init__(**options)

    def bounded(
        self,
        cost: costs.Cost,
        function: Function,
        values: list[Any],
        options: dict[str, Any],
        *,
        escapes: bool = False,
    ) -> Any:
        """Call a function if its largest possible result fits the budget."""
        most = cost(*values, **options)
        if escapes or any(map(_is_marked, [*values, *options.values()])):
            most *= costs.ESCAPED
        self.budget.room(most)
        result = function(*values, **options)
        self.budget.take(1, len(result) if isinstance(result, str) else most)
        return self.budget.counted(result) if isinstance(result, Iterator) else result

    def comparable(self, value: Any) -> Any:
        """Count the items that a comparison visits."""
        if isinstance(value, str):
            self.budget.take(len(value) >> 10)
        elif size(value):
            self.budget.room(self.budget.weigh(value, a_character=1))
        return value

    def counted(self, result: Any) -> Any:
        """Count a call and its text."""
        self.budget.take(1, len(result) if isinstance(result, str) else 0)
        return result


def _is_marked(value: Any) -> bool:
    return isinstance(value, markupsafe.Markup)


def _metered(name: str, function: Function, cost: costs.Cost) -> Function:
    passes = jinja2.utils._PassArg.from_obj(function)

    @jinja2.pass_context
    def metered(context: jinja2.runtime.Context, *args: Any, **kwargs: Any) -> Any:
        environment = context.environment
        assert isinstance(environment, MeteredEnvironment)
        values = list(args)
        if name in _ITERATED and values and isinstance(values[0], Iterator):
            values[0] = list(values[0])
        if name not in ("d", "default"):
            for option in [*values[1:], *kwargs.values()]:
                if isinstance(option, list | tuple | dict):
                    environment.comparable(option)
        call = function
        if passes is not None:
            passed = {"context": context, "eval_context": context.eval_ctx}
            call = partial(function, passed.get(passes.name, environment))
        return environment.bounded(partial(cost, environment.budget), call, values, kwargs)

    return metered


def _looking(test: Any) -> Function:
    passes = jinja2.utils._PassArg.from_obj(test) is not None

    @jinja2.pass_context
    def looking(context: jinja2.runtime.Context, *args: Any) -> Any:
        environment = context.environment
        assert isinstance(environment, MeteredEnvironment)
        for value in args:
            environment.comparable(value)
        return test(environment, *args) if passes else test(*args)

    return looking


class _Fields(string.Formatter):
    """`str.format` that checks each field against the budget."""

    budget: Budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Write a field."""
        most = self.budget.text(value) + costs.format_width(self.budget, format_spec)
        self.budget.room(costs.ESCAPED * most)
        text = super().format_field(value, format_spec)
        self.budget.take(1, len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply a conversion such as `!r`."""
        if conversion is not None:
            self.budget.room(self.budget.weigh(value))
        return super().convert_field(value, conversion)


class Format(_Fields, jinja2.sandbox.SandboxedFormatter):
    """`str.format` of plain text."""


class EscapingFormat(_Fields, jinja2.sandbox.SandboxedEscapeFormatter):
    """`str.format` of escaped text, which escapes its values."""


def check_numbers(operator: str, *numbers: Any) -> None:
    """Refuse numbers with huge results."""
    if max(abs(one) for one in numbers) > 1e30:
        raise BudgetError(f"numbers beyond 1e30 in {operator!r}")
    if operator == "**" and (abs(numbers[0]) > 1e6 or abs(numbers[1]) > 64):
        raise BudgetError("a power of more than a million, or to more than 64")


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that the sandbox hides."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {shown(name)}")
        super().__setitem__(name, value)

    # What it holds can be long, and can be itself.
    def __repr__(self) -> str:
        return "<Namespace>"


@jinja2.pass_environment
def _join(environment: MeteredEnvironment, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = _values(environment, value, attribute)
    budget = environment.budget
    budget.room(sum(map(budget.text, items)) + budget.text(d) * len(items))
    return str(d).join(map(str, items))


@jinja2.pass_environment
def _sum(
    environment: MeteredEnvironment, iterable: Any, attribute: Any = None, start: Any = 0
) -> Any:
    items = _values(environment, iterable, attribute)
    total = most = size(start)
    for item in items:
        if isinstance(item, int | float):
            check_numbers("sum", item)
        total += size(item)
        most += total
    environment.budget.take(len(items), POINTER * most)
    return sum(items, start)


def _values(environment: MeteredEnvironment, value: Any, attribute: Any) -> list[Any]:
    environment.budget.take(0, POINTER * size(value))
    if attribute is None:
        return list(value)
    return list(map(jinja2.filters.make_attrgetter(environment, attribute), value))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter writes < and > as escapes, which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


FILTERS: dict[str, Function] = {
    name: _metered(
        name,
        {"join": _join, "sum": _sum, "tojson": _to_json}.get(name, jinja2.filters.FILTERS[name]),
        cost,
    )
    for name, cost in costs.FILTERS.items()
}
TESTS: dict[str, Any] = {
    name: _looking(test) if name in costs.TESTS else test
    for name, test in jinja2.tests.TESTS.items()
}
_FUNCTIONS: dict[str, Function] = {
    "range": jinja2.sandbox.safe_range,
    "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    "namespace": lambda *args, **kwargs: _Namespace(*args, **kwargs),
    "cycler": lambda *items: jinja2.utils.Cycler(*items),
    "joiner": lambda sep=", ": jinja2.utils.Joiner(sep),
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
GLOBALS: dict[str, Any] = {
    name: _metered(name, _FUNCTIONS[name], cost) for name, cost in costs.GLOBALS.items()
}
