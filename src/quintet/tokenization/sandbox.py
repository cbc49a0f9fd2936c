"""Runs untrusted templates: plain data in, limited work, text out."""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.lexer
import jinja2.meta
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import markupsafe

from quintet.errors import ChatTemplateError
from quintet.tokenization import costs
from quintet.tokenization.budget import ITEM, POINTER, BudgetError, size
from quintet.tokenization.callables import (
    FILTERS,
    GLOBALS,
    TESTS,
    EscapingFormat,
    Format,
    MeteredEnvironment,
    check_numbers,
)
from quintet.tokenization.metering import metered
from quintet.tokenization.rendered import Rendered

MAX_SOURCE = 256 * 1024
# The longest published templates have about 5,000; compiling takes 50 µs and 5 kB for each.
MAX_TOKENS = 20_000
MAX_MESSAGE = 1000
_OWN = (
    jinja2.runtime.LoopContext,
    jinja2.runtime.Macro,
    jinja2.runtime.Undefined,
    jinja2.utils.Cycler,
    jinja2.utils.Joiner,
    jinja2.utils.Namespace,
    jinja2.runtime.TemplateReference,
    jinja2.runtime.BlockReference,
)


class CompiledTemplate:
    """A compiled template; each rendering has its own budget.

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
            self._code: types.CodeType = environment.compile(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is not valid, line {error.lineno}: {_short(error.message)}"
            ) from error
        except (RecursionError, MemoryError) as error:
            raise ChatTemplateError("the chat template is nested too deeply") from error
        # What jinja2 lets through, Python's compiler may refuse: a `break` outside of a loop,
        # twenty loops in each other, half of a surrogate pair.
        except Exception as error:
            raise ChatTemplateError(f"the chat template is not valid: {_short(error)}") from error

    def render(self, variables: Mapping[str, Any], *, none_is_text: bool = True) -> Rendered:
        """Run the template on plain data.

        Args:
            variables: what it sees.
            none_is_text: write None as "None"; otherwise that is an error.

        Raises:
            ChatTemplateError: it failed, refused the conversation, or ran over its budget.
        """
        environment = _Sandbox()
        environment.none_is_text = none_is_text
        template = jinja2.Template.from_code(environment, self._code, environment.globals)
        parts: list[str] = []
        try:
            for part in template.generate(dict(variables)):
                environment.length += len(part)
                environment.budget.take(0, len(part))
                parts.append(part)
        except (BudgetError, MemoryError, RecursionError) as error:
            reason = error if isinstance(error, BudgetError) else type(error).__name__
            raise ChatTemplateError(f"the chat template ran over its budget: {reason}") from error
        # A stranger's program can fail in any way; whichever it is, the template is at fault.
        except Exception as error:
            raise ChatTemplateError(f"the chat template failed: {_short(error)}") from error
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

    def filter_stream(self, stream: jinja2.lexer.TokenStream) -> Iterator[jinja2.lexer.Token]:
        """Count the tokens of a template."""
        for count, token in enumerate(stream):
            if count == MAX_TOKENS:
                raise jinja2.TemplateSyntaxError(f"more than {MAX_TOKENS} tokens", token.lineno)
            yield token

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(self.environment, _Sandbox)
        self.environment.has_generation = True
        call = nodes.Call(nodes.EnvironmentAttribute("mark_generation"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Sandbox(MeteredEnvironment):
    """An environment for one compilation or one rendering."""

    intercepted_binops = frozenset(["+", "-", "*", "//", "**", "%"])
    intercepted_unops = frozenset(["+", "-"])

    def __init__(self) -> None:
        self.length = 0
        self.none_is_text = True
        self.has_generation = False
        self.generated: list[tuple[int, int, str]] = []
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._as_text,
            optimized=False,
        )
        self.filters = FILTERS
        self.tests = TESTS
        self.globals = GLOBALS

    # -- what the changed syntax calls ---------------------------------------------------------

    def step(self) -> bool:
        """Count one loop item."""
        self.budget.take(1)
        return True

    def enter(self, characters: int) -> str:
        """Count one pass through a loop or macro."""
        self.budget.take(1, characters)
        return ""

    def join(self, *parts: Any) -> str:
        """Join like `~`."""
        self.budget.room(sum(map(self.budget.text, parts)))
        text = "".join(map(str, parts))
        self.budget.take(1, len(text))
        return text

    def literal(self, value: Any) -> Any:
        """Count a list, tuple or dict literal."""
        a_place = 2 * ITEM if isinstance(value, dict) else POINTER
        self.budget.take(1, ITEM + a_place * len(value))
        return value

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Take a slice."""
        piece = slice(start, stop, step)
        if isinstance(value, str | list | tuple):
            count = len(range(*piece.indices(len(value))))
            self.budget.take(1, count if isinstance(value, str) else ITEM + POINTER * count)
        return value[piece]

    def few(self, arguments: Any) -> Any:
        """Refuse to unpack many arguments."""
        given = list(arguments) if isinstance(arguments, Iterator) else arguments
        if size(given) > 256:
            raise BudgetError("more than 256 arguments of a call")
        return given

    def mark_generation(self, caller: Callable[[], str]) -> str:
        """Record the span of a `{% generation %}` block."""
        text = caller()
        self.generated.append((self.length, self.length + len(text), text))
        return text

    # -- calls, within the budget --------------------------------------------------------------

    # With the context, so that nothing is written down when the template is compiled.
    @jinja2.pass_context
    def _as_text(self, context: jinja2.runtime.Context, value: Any) -> str:
        if value is None and not self.none_is_text:
            raise jinja2.TemplateError("it writes None, which a message has as a value")
        self.budget.room(self.budget.text(value))
        text = str(value)
        self.budget.take(1, len(text))
        return text

    # -- jinja2's hooks -----------------------------------------------------------------------

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for escaping in tree.find_all(nodes.ScopedEvalContextModifier):
            raise jinja2.TemplateSyntaxError("there is no autoescape here", escaping.lineno)
        return metered(tree)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function within the budget."""
        if isinstance(__obj, types.MethodType | types.BuiltinMethodType):
            owner = __obj.__self__
            own = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            if owner is __self:
                return __obj(*args, **own)
            for kind, methods in costs.METHODS.items():
                if isinstance(owner, kind):
                    given = [list(one) if isinstance(one, Iterator) else one for one in args]
                    cost = functools.partial(methods[__obj.__name__], __self.budget, owner)
                    escapes = isinstance(owner, markupsafe.Markup)
                    return __self.bounded(cost, __obj, given, own, escapes=escapes)
            # The rest are a loop's, which compares what has changed.
            __self.comparable(args)
        return __self.counted(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look up an item within the budget."""
        if not isinstance(argument, str | int):
            self.budget.room(self.budget.weigh(argument))
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the metered `str.format`."""
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        formatter = (
            EscapingFormat(self, escape=text.escape)
            if isinstance(text, markupsafe.Markup)
            else Format(self)
        )
        formatter.budget = self.budget

        def formatted(*args: Any, **kwargs: Any) -> str:
            self.budget.take(1, len(text))
            if value.__name__ == "format":
                return type(text)(formatter.vformat(text, args, kwargs))
            if len(args) != 1 or kwargs:
                raise TypeError("format_map() takes exactly one argument")
            return type(text)(formatter.vformat(text, (), args[0]))

        return formatted

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate an operation with a possibly huge result."""
        most = self._size_of_result(operator, left, right)
        if isinstance(left, markupsafe.Markup) or isinstance(right, markupsafe.Markup):
            most *= costs.ESCAPED
        self.budget.room(most)
        result = super().call_binop(context, operator, left, right)
        self.budget.take(1, len(result) if isinstance(result, str) else most)
        return result

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:
        """Evaluate a sign."""
        check_numbers(operator, arg)
        return super().call_unop(context, operator, arg)

    def _size_of_result(self, operator: str, left: Any, right: Any) -> int:
        numbers = [one for one in (left, right) if isinstance(one, int | float)]
        if len(numbers) == 2:
            check_numbers(operator, *numbers)
            return 0
        if operator == "%" and isinstance(left, str):
            return costs.percent(self.budget, left, right)
        if operator == "-":
            self.comparable(left)
            return ITEM * size(left)
        places = sum(
            len(one) * (1 if isinstance(one, str) else POINTER)
            for one in (left, right)
            if isinstance(one, str | list | tuple)
        )
        times = [one for one in numbers if isinstance(one, int)] if operator == "*" else []
        return places * max(times[0], 0) if times else places

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may read an attribute."""
        if isinstance(obj, jinja2.filters._GroupTuple) and attr in ("grouper", "list"):
            return True
        for kind, methods in costs.METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return isinstance(obj, _OWN) and super().is_safe_attribute(obj, attr, value)


def _short(error: object) -> str:
    text = str(error)
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
