"""The one place that runs templates of strangers: plain data in, a budget of work, text out."""

import datetime
import functools
import json
import re
import time
import types
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from quintet.errors import ChatTemplateError
from quintet.tokenization.templates import Rendered

__all__ = ["Source"]

MAX_SOURCE = 256 * 1024
MAX_STEPS = 1_000_000
MAX_SECONDS = 0.8
MAX_CHARACTERS = 16 * 1024 * 1024
MAX_NUMBER = 100_000

_STR_METHODS = frozenset(
    (
        *("capitalize", "casefold", "center", "count", "endswith", "find", "format"),
        *("format_map", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit"),
        *("isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle"),
        *("isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix"),
        *("removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit"),
        *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title"),
        *("upper", "zfill"),
    )
)
# Not for chat: they run regular expressions over the text, are random, or read objects.
_NO_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr", "filesizeformat")
_WIDTH = re.compile(r"\d{6,}")


class _BudgetError(Exception):
    """The template did more than a chat template has reason to."""


class Source:
    """A template, compiled once; each rendering has an environment and a budget of its own.

    Raises:
        ChatTemplateError: it is too long, or not a template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE}"
            )
        environment = _Sandbox()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) - set(
                environment.globals
            )
            self.has_generation = environment.has_generation
            self._code: types.CodeType = environment.compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is not valid, line {error.lineno}: {error.message}"
            ) from error
        except RecursionError as error:
            raise ChatTemplateError("the chat template is nested too deeply") from error

    def render(self, variables: dict[str, Any]) -> Rendered:
        """Run the template on plain data.

        Raises:
            ChatTemplateError: it failed, refused the conversation, or ran over its budget.
        """
        environment = _Sandbox()
        template = jinja2.Template.from_code(environment, self._code, environment.globals)
        parts: list[str] = []
        try:
            for part in template.generate(variables):
                environment.length += len(part)
                environment.spend(0, len(part))
                parts.append(part)
        except (_BudgetError, MemoryError, RecursionError) as error:
            reason = error if isinstance(error, _BudgetError) else type(error).__name__
            raise ChatTemplateError(f"the chat template ran over its budget: {reason}") from error
        # A stranger's program can fail in any way; whichever it is, the template is at fault.
        except Exception as error:
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        text = "".join(parts)
        if any(text[start:end] != inner for start, end, inner in environment.generated):
            raise ChatTemplateError(
                "the chat template has {% generation %} inside of a macro or a block, where its "
                "place in the text is not known"
            )
        return Rendered(text, tuple((start, end) for start, end, _ in environment.generated))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` encloses what the model itself wrote."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(self.environment, _Sandbox)
        self.environment.has_generation = True
        call = nodes.Call(nodes.EnvironmentAttribute("mark_generation"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment for one compilation or one rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self.length = 0
        self.has_generation = False
        self.generated: list[tuple[int, int, str]] = []
        self._deadline = time.thread_time() + MAX_SECONDS
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._count_output,
            optimized=False,
        )
        self.filters = {
            name: self._metered(name, function)
            for name, function in {**self.filters, "tojson": _to_json}.items()
            if name not in _NO_FILTERS
        }
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": _make_dict,
            "namespace": _Namespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    # -- the budget ---------------------------------------------------------------------------

    def spend(self, steps: int, characters: int = 0) -> bool:
        """Take from the budget.

        Raises:
            _BudgetError: there is nothing left.
        """
        self.steps += steps
        self.characters += characters
        if self.steps > MAX_STEPS:
            raise _BudgetError(f"more than {MAX_STEPS} steps")
        if self.characters > MAX_CHARACTERS:
            raise _BudgetError(f"more than {MAX_CHARACTERS} characters")
        # The clock of the thread: a busy machine must not fail an honest template.
        if (self.steps % 64 == 0 or characters > 1024) and time.thread_time() > self._deadline:
            raise _BudgetError(f"more than {MAX_SECONDS} seconds")
        return True

    def enter(self, characters: int) -> str:
        """Count one pass through the body of a loop or macro."""
        self.spend(1, characters)
        return ""

    def join(self, *parts: Any) -> str:
        """Join as `~` does, counting the characters."""
        text = [str(part) for part in parts]
        self.spend(1, sum(map(len, text)))
        return "".join(text)

    def mark_generation(self, caller: Callable[[], str]) -> str:
        """Note where the text of a `{% generation %}` block comes to stand."""
        text = caller()
        self.generated.append((self.length, self.length + len(text), text))
        return text

    def _count_output(self, value: Any) -> Any:
        if isinstance(value, str):
            self.spend(1, len(value))
        return value

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = [arg for arg in args if not isinstance(arg, jinja2.runtime.Context)]
            self._foresee(name, values, kwargs)
            return self._counted(function(*args, **kwargs))

        return metered

    def _counted(self, result: Any) -> Any:
        size = len(result) if isinstance(result, str | list | tuple | dict) else 0
        self.spend(1, size)
        return result

    def _foresee(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Refuse a call whose result would be too large, before it is made."""
        values = [*args, *kwargs.values()]
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_NUMBER and name not in _TAKES_NUMBERS:
                raise _BudgetError(f"{name} with a number beyond {MAX_NUMBER}")
        texts = [value for value in values if isinstance(value, str)]
        if name == "replace" and len(texts) >= 3:
            text, old, new = texts[:3]
            self.spend(1, (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join" and texts:
            groups = [value for value in values if isinstance(value, list | tuple | dict | str)]
            self.spend(1, max(map(len, texts)) * max(map(len, groups)))
        elif name in ("format", "format_map", "%") and texts:
            if _WIDTH.search(texts[0]):
                raise _BudgetError("a format with a width of more than five digits")
            holes = texts[0].count("{") + texts[0].count("%")
            self.spend(1, holes * max((len(str(value)) for value in values[1:]), default=0))
        elif name == "indent" and texts:
            width = max((value for value in values if isinstance(value, int)), default=4)
            self.spend(1, (texts[0].count("\n") + 1) * max(width, *map(len, texts[1:]), 0))

    # -- jinja2's hooks -----------------------------------------------------------------------

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _meter(super()._parse(source, name, filename))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function for the template, within the budget."""
        is_method = isinstance(__obj, types.MethodType | types.BuiltinMethodType)
        if is_method and __obj.__self__ is __self:
            own = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            return __obj(*args, **own)
        if is_method and isinstance(__obj.__self__, str):
            __self._foresee(__obj.__name__, [__obj.__self__, *args], kwargs)
        return __self._counted(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` as the sandbox has it, within the budget."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def metered(*args: Any, **kwargs: Any) -> str:
            self._foresee(value.__name__, [value.__self__, *args], kwargs)
            return wrapped(*args, **kwargs)

        return metered

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation whose result could be very large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers:
            if operator == "**" and (abs(left) > 1e6 or abs(right) > 64):
                raise _BudgetError(f"{left} ** {right}")
            if max(abs(left), abs(right)) > 1e30:
                raise _BudgetError(f"numbers beyond 1e30 in {operator!r}")
        elif operator == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(what, str | list | tuple):
                self.spend(1, max(times, 0) * len(what))
        elif operator == "%" and isinstance(left, str):
            values = list(right) if isinstance(right, tuple) else [right]
            self._foresee("%", [left, *values], {})
        return self._counted(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may read an attribute."""
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


_TAKES_NUMBERS = frozenset(
    ["abs", "default", "d", "float", "int", "round", "string", "tojson", "sum"]
)


def _meter(tree: nodes.Template) -> nodes.Template:
    """Make every loop, macro and joining of texts count itself."""
    for loop in list(tree.find_all(nodes.For)):
        loop.body.insert(0, _enter(loop.body))
        if loop.test is not None:
            spend = nodes.Call(
                nodes.EnvironmentAttribute("spend"), [nodes.Const(1)], [], None, None
            )
            loop.test = nodes.And(spend, loop.test)
    for macro in list(tree.find_all(nodes.Macro)):
        macro.body.insert(0, _enter(macro.body))
    for block in list(tree.find_all(nodes.CallBlock)):
        block.body.insert(0, _enter(block.body))
    _Joins().visit(tree)
    assert tree.environment is not None
    tree.set_environment(tree.environment)
    return tree


class _Joins(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join"), node.nodes, [], None, None)


def _enter(body: list[nodes.Node]) -> nodes.Output:
    literal = sum(len(data.data) for part in body for data in _with_self(part))
    call = nodes.Call(nodes.EnvironmentAttribute("enter"), [nodes.Const(literal)], [], None, None)
    return nodes.Output([call])


def _with_self(part: nodes.Node) -> list[nodes.TemplateData]:
    found = list(part.find_all(nodes.TemplateData))
    return [part, *found] if isinstance(part, nodes.TemplateData) else found


class _Namespace(jinja2.utils.Namespace):
    """A namespace that stores no name the sandbox would not read."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


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


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
