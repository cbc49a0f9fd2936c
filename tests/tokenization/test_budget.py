"""How much memory and time a template of a stranger can take, at most."""

import tracemalloc
from typing import Any

import pytest

import quintet.tokenization.budget as budget_module
from quintet.errors import ChatTemplateError
from quintet.tokenization.sandbox import MAX_TOKENS, CompiledTemplate
from work import in_sums

MILLION = "{% set a = 'a' * 1000000 %}"
# Lists and tuples whose text would have 2 ** 40 characters.
NESTED = (
    "{% set n = namespace(x=[1], t=(1,)) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)
TWICE = NESTED + "{% set x, t = n.x, n.t %}" + NESTED


def kept(what: str, before: str = MILLION) -> str:
    """A template that keeps what an expression makes, again and again."""
    loop = "{% set k = namespace(x=[]) %}{% for i in range(99000) %}{% set k.x = [k.x, %s] %}"
    return before + loop.replace("%s", what) + "{% endfor %}"


GROWING = {
    "json, indented": "{{ [1] | tojson(indent=10 ** 8) }}",
    "json, indented deeply": "{% set n = namespace(x=[1]) %}{% for i in range(400) %}"
    "{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson(indent=50000) }}",
    "json, indented by text": MILLION + "{{ ([[1]] * 90) | tojson(indent=a) }}",
    "json, separated": MILLION + "{{ ([1] * 1000) | tojson(separators=(a, a)) }}",
    "json, escaped": "{{ ('\\x00' * 4000000) | tojson }}",
    "format, width given": "{{ ('{0:{1}}' * 1000).format(1, 100000) }}",
    "format, width": "{{ ('{0:99999}' * 1000).format(1) }}",
    "format, precision": "{{ ('{0:.99999f}' * 1000).format(1.0) }}",
    "format, other digits": "{{ '{:١٠٠٠٠٠٠٠٠}'.format(1) }}",
    "format_map": "{{ ('{a:99999}' * 1000).format_map({'a': 1}) }}",
    "format by attr": "{{ (('{0:99999}' * 1000) | attr('format'))(1) }}",
    "percent, width given": "{{ ('%*d' * 1000) % ((100000, 1) * 1000) }}",
    "percent, width": "{{ ('%99999d' * 1000) % ((1,) * 1000) }}",
    "percent, behind a key": "{{ ('%(a(b))99999d' * 1000) % {'a(b)': 1} }}",
    "percent, precision": "{{ '%.100000000f' % 1.0 }}",
    "percent, a text": MILLION + "{{ ('%s' * 50) % ((a,) * 50) }}",
    "percent, quoted": "{{ ('%r' * 50) % (('\\x00' * 100000,) * 50) }}",
    "percent, large numbers": "{{ ('%f' * 90000) % ((1e308,) * 90000) }}",
    "percent, from a list": "{{ ['%100000000d'] | format(1) }}",
    "times": "{{ 'a' * 100000 * 100000 }}",
    "times, tuples": "{{ ((1,) * 100000 * 100000) | length }}",
    "marked as safe": "{{ ('x' | safe) + '\"' * 10000000 }}",
    "joined by what is safe": "{{ (',' | safe).join(['\"' * 5000000]) }}",
    "filled into what is safe": "{{ ('{0}' * 10 | safe).format('\"' * 3000000) }}",
    "escaped": "{{ ('\"' * 10000000) | e }}",
    "autoescape": "{% autoescape true %}{{ '\"' * 10000000 }}{% endautoescape %}",
    "in a url": "{{ ('é' * 3000000) | urlencode }}",
    "upper case": "{{ ('ΐ' * 8000000) | upper }}",
    "indented": "{{ ('\\n' * 100000) | indent(100000) }}",
    "indented, other lines": "{{ ('\\x0b' * 100000) | indent(100000) }}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slice": "{{ [1] | slice(10 ** 9, 0) | list }}",
    "split": "{{ ('a' * 8000000).split('a') | length }}",
    "splitlines": "{{ ('\\n' * 8000000).splitlines() | length }}",
    "letters": "{{ ('ab' * 4000000) | list | length }}",
    "replaced": MILLION + "{{ a.replace('', 'b' * 100) }}",
    "replaced numbers": "{{ 1111111 | replace(1, 'b' * 10000000) }}",
    "joined attributes": "{{ ([{'a': 'x' * 100000}] * 1000) | join(attribute='a') }}",
    "joined iterators": "{{ ('a' * 1000).join(([1] * 90000) | map('string')) }}",
    "padded": "{{ 'a'.zfill(10 ** 9) }}",
    "summed lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "rounded": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "a date": "{{ strftime_now('%Y' * 1000000) }}",
    "kept slices": kept("a[1:]"),
    "kept slices of lists": kept("b[1:]", "{% set b = [1] * 1000000 %}"),
    "kept copies": kept("b.copy()", "{% set b = [1] * 1000000 %}"),
    "kept dicts": kept("dict(many)", ""),
    "kept lists": kept("range(90000) | list", ""),
    "kept literals": kept("[" + "1, " * 5000 + "]", ""),
    "kept numbers": kept("a | int(0, 32)", "{% set a = '1' * 1000000 %}"),
    "kept signs": kept("-a", "{% set a = ('1' * 1000000) | int(0, 32) %}"),
    "kept halves": kept("a // 2", "{% set a = ('1' * 1000000) | int(0, 32) %}"),
    "arguments": "{% macro f(n) %}{{ f(n - 1, *varargs) }}{% endmacro %}{{ f(9, *([1] * 90000)) }}",
    "named arguments": "{% macro f(n) %}{{ f(n - 1, **kwargs) }}{% endmacro %}{{ f(9, **many) }}",
    "one wide character": "{% set n = namespace(s='a😀') %}{% for i in range(40) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a message of an error": MILLION + "{{ raise_exception(('%s' * 50) % ((a,) * 50)) }}",
}
ENDLESS = {
    "written": NESTED + "{{ n.x }}",
    "joined to a text": NESTED + "{{ n.x ~ '' }}",
    "json": NESTED + "{{ n.x | tojson }}",
    "format": NESTED + "{{ '{!r}'.format(n.x) }}",
    "a format's own": NESTED + "{{ '{:{}}'.format(1, n.x) }}",
    "percent": NESTED + "{{ '%s' % n.t }}",
    "join": NESTED + "{{ [n.x] | join }}",
    "views": NESTED + "{{ {1: n.x}.items() }}",
    "compared": TWICE + "{{ n.x == x }}",
    "found": TWICE + "{{ x in [n.x] }}",
    "selected": TWICE + "{{ [x] | select('equalto', n.x) | list | length }}",
    "a test": TWICE + "{{ x is eq n.x }}",
    "sorted": TWICE + "{{ [x, n.x] | sort | length }}",
    "searched": TWICE + "{{ [x].index(n.x) }}",
    "changed": TWICE + "{% for q in [x, n.x] %}{{ loop.changed(q) }}{% endfor %}",
    "a key": NESTED + "{{ {n.t: 1} }}",
    "a look-up": NESTED + "{{ {}[n.t] }}",
    "get": NESTED + "{{ {}.get(n.t) }}",
    "unique": NESTED + "{{ [n.t] | unique | list | length }}",
    "a filter's name": NESTED + "{{ [1] | map(n.t) | list }}",
    "a test's name": NESTED + "{{ n.t is filter }}",
    "an error": NESTED + "{{ {}[n.x].x.y }}",
    "raised": NESTED + "{{ raise_exception(n.x) }}",
    "searched from the right": MILLION + "{{ (a * 8).rfind('b' ~ a * 4) }}",
    "stripped": MILLION + "{{ a.strip('b' * 1000000 ~ 'a') }}",
    "texts": MILLION + "{% set b = a ~ '' %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
}
MANY = {str(number): number for number in range(20_000)}


def peak(template: str) -> float:
    """Render what has to be refused and return the megabytes that it took."""
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            CompiledTemplate(template).render({"messages": [], "many": MANY})
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", GROWING)
def test_what_grows_is_refused_before_it_is_made(name: str) -> None:
    assert peak(GROWING[name]) < 100


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_not_begun(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "MAX_SECONDS", 0.1)
    peaks = []
    assert in_sums(lambda: peaks.append(peak(ENDLESS[name]))) < 10
    assert peaks[0] < 30


@pytest.mark.parametrize(
    "template",
    [
        "{{a}}" * 50_000,
        "{{ " + "~".join(["a"] * 60_000) + " }}",
        "{{ [" + "a," * 80_000 + "] }}",
        "{% if a %}" + "{% elif a %}" * 15_000 + "{% endif %}",
        "{% macro a() %}{% endmacro %}" * 8_000,
    ],
)
def test_a_long_template_is_not_compiled(template: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"more than {MAX_TOKENS} tokens"):
        CompiledTemplate(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% break %}",
        "{% macro f() %}{% continue %}{% endmacro %}",
        "{% for a in b %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "9" * 5_000 + " }}",
        "{{ " + "not " * 10_000 + "a }}",
        "{{ a" + ".a" * 8_000 + " }}",
    ],
)
def test_what_python_does_not_compile_is_no_template(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        CompiledTemplate(template)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ ('x' | safe) + '<' }}{{ '%s' % ('<' | e) }}", "x&lt;&lt;"),
        ("{{ '{:>5}|{!r}'.format('a', 'b') }}{{ '{a}'.format_map({'a': 1}) }}", "    a|'b'1"),
        ("{{ '%-4s|%05.1f|%(x' % ('a', 2.25) }}", None),
        ("{{ '%(k)s %%' % {'k': 'v'} }}", "v %"),
        ("{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2] | sum }}", "[1, 2]3"),
        ("{{ [{'a': 1}, {'a': 2}] | sum(attribute='a') }}", "3"),
        ("{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}", "1-2"),
        ("{{ 'abc'[::-1] }}{{ [1, 2, 3][1:] }}{{ (1, 2)[:1] }}", "cba[2, 3](1,)"),
        ("{{ [3, 1] | sort }}{{ [1, 1] | unique | list }}{{ [1, 2, 3] | batch(2) | list }}",
         "[1, 3][1][[1, 2], [3]]"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}", "[('a', 2), ('b', 1)]"),
        ("{% for g in [{'r': 1}] | groupby('r') %}{{ g.grouper }}{% endfor %}", "1"),
        ("{{ ','.join([1, 2] | map('string')) }}{{ 'a b'.split() }}", "1,2['a', 'b']"),
        ("{{ {'a': 1}.get('b', 2) }}{{ [1, 2].index(2) }}{{ {1: 2} == {1: 2} }}", "21True"),
        ("{{ 1 < 2 < 3 }}{{ 'a' in 'ab' }}{{ 1 in [2] }}", "TrueTrueFalse"),
        ("{{ 'a\\nb' | indent(2) }}|{{ 'abc' | truncate(3) }}|{{ 2.567 | round(1) }}",
         "a\n  b|abc|2.6"),
        ("{{ namespace(a=1) }}{{ '12' | int + 1 }}{{ -3 | abs }}", "<Namespace>133"),
    ],
)  # fmt: skip
def test_counting_changes_no_text(template: str, text: str | None) -> None:
    variables: dict[str, Any] = {"messages": []}
    if text is None:
        with pytest.raises(ChatTemplateError):
            CompiledTemplate(template).render(variables)
    else:
        assert CompiledTemplate(template).render(variables).text == text


def test_a_message_of_an_error_ends() -> None:
    for template in ("{% " + "a" * 100_000 + " %}", "{{ raise_exception('a' * 100000) }}"):
        with pytest.raises(ChatTemplateError) as caught:
            CompiledTemplate(template).render({})
        assert len(str(caught.value)) < 1200
