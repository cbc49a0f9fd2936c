from typing import Any

import pytest

from quintet.errors import ChatTemplateError
from quintet.tokenization.sandbox import CompiledTemplate
from work import in_sums

MESSAGES = [{"role": "user", "content": "x"}]


def render(template: str, **variables: Any) -> str:
    return CompiledTemplate(template).render({"messages": MESSAGES, **variables}).text


BOMBS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(100000) %}{% for b in range(100000) if 0 %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "lists": "{{ [1] * 10 ** 9 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(64) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "adding": "{% set n = namespace(s='ab') %}{% for i in range(64) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "lists of lists": "{% set n = namespace(s=[1]) %}{% for i in range(64) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set n = namespace(s=9) %}{% for i in range(64) %}"
    "{% set n.s = n.s * n.s %}{% endfor %}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "join": "{{ range(100000) | join('a' * 100000) }}",
    "text": "{% set y %}{% for a in range(100000) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
    "sorting": "{% for i in range(100000) %}{{ range(99999) | sort | last }}{% endfor %}",
    "summing": "{% for i in range(100000) %}{{ range(99999) | sum }}{% endfor %}",
    "nested too deeply": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too long": "x" * 300_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_after_little_work(name: str) -> None:
    def explode() -> None:
        with pytest.raises(ChatTemplateError):
            render(BOMBS[name])

    assert in_sums(explode) < 10


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id') }}",
        "{{ range.__globals__.x }}",
        "{{ raise_exception.__globals__.json.x }}",
        "{{ (messages | attr('__class__')).x }}",
        "{{ messages | map(attribute='__class__') | map(attribute='x') | list | first + 1 }}",
        "{{ '{0.__class__.__mro__}'.format('') + 1 }}",
        "{{ '{x.__class__}'.format_map({'x': ''}) + 1 }}",
        "{{ ''['__class__'].x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ config.items() }}",
        "{{ request.application }}",
        "{{ get_flashed_messages.__globals__.x }}",
        "{{ dict.mro() }}",
        "{{ dict.__base__.x }}",
        "{{ ''.translate({}) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ [].__reduce_ex__(2) }}",
        "{{ strftime_now.__globals__.x }}",
    ],
)
def test_ways_out_of_the_sandbox_are_closed(payload: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(payload)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in 'ab' %}{{ loop.index }}{{ m }}{% if not loop.last %},{% endif %}{% endfor %}",
         "1a,2b"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in '012' %}{% if i == '1' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in range(5) if i % 2 %}{{ i }}{% endfor %}", "13"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ [1] | tojson(separators=(',', ':')) }}", "[1]"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ messages[::-1][0]['content'].split('</think>')[-1].lstrip('\\n') }}", "x"),
        ("{% set n = namespace(a=1) %}{% for i in '12' %}{% set n.a = n.a + 1 %}{% endfor %}"
         "{{ n.a }}", "3"),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) ~ '|' ~ f(b=1, a=2) }}",
         "12|21"),
        ("{% call(x) wrap() %}{{ x }}{% endcall %}", None),
        ("  {% if true %}\nyes\n  {% endif %}\n", "yes\n"),
        ("{{ '<b>' }}{{ none }}{{ missing }}", "<b>None"),
        ("{{ 5 | string }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a' * 3 }}", "538aaa"),
        ("{{ '%s-%d' % ('a', 1) }}", "a-1"),
        ("{{ dict(a=1).a }}{{ messages is iterable }}{{ 'x' in messages[0].values() }}",
         "1TrueTrue"),
        ("{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ [{'r': 1}, {'r': 2}] | selectattr('r', 'equalto', 2) | list | length }}", "1"),
        ("{{ 'a b' | title | replace(' ', '_') | indent(2, true) }}", "  A_B"),
    ],
)  # fmt: skip
def test_honest_templates_do_what_jinja_says(template: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(ChatTemplateError, match="'wrap' is undefined"):
            render(template)
    else:
        assert render(template) == text


def test_templates_can_refuse_a_conversation() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_date_is_todays() -> None:
    import datetime

    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_mistakes_name_the_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        CompiledTemplate("a\n{% for %}")


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 5000
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
    assert len(render(template, messages=messages)) > 4_900_000


def test_generated_parts_are_marked_where_they_stand() -> None:
    template = (
        "{% for m in messages %}<{% generation %}{{ m.content }}!{% endgeneration %}>{% endfor %}"
    )
    source = CompiledTemplate(template)
    rendered = source.render({"messages": [{"content": "ab"}, {"content": "c"}]})
    assert rendered.text == "<ab!><c!>"
    assert [rendered.text[slice(*span)] for span in rendered.generated] == ["ab!", "c!"]
    hidden = "{% macro f() %}..{% generation %}a{% endgeneration %}{% endmacro %}{{ f() }}"
    with pytest.raises(ChatTemplateError, match="inside of a macro"):
        CompiledTemplate(hidden).render({})


def test_renderings_do_not_share_their_budget() -> None:
    source = CompiledTemplate("{% for i in range(90000) %}{% endfor %}")
    for _ in range(15):
        source.render({})
