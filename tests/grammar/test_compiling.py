"""What can be used as a grammar, what cannot and why, and what that may take."""

import json
import socket
import threading
import time
from typing import Any

import pytest
import torch

from grammar.checking import at_random
from quintet import AutoTokenizer, demo_model, grammar
from quintet.errors import GrammarError, InputError
from quintet.grammar import Constraint, GrammarProcessor, Grammars, compiling
from quintet.grammar.compiled import Compiled

tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
V, END = len(tokenizer), tokenizer.eos_token_id
GRAMMARS = Grammars(tokenizer, V)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def closed(**properties: Any) -> dict[str, Any]:
    return {**of(**properties), "additionalProperties": False}


def nested(depth: int, *, text: bool) -> Any:
    if text:
        return '{"items":' * depth + "{}" + "}" * depth
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


# -- schemas that cannot be used: the keyword and its place are told ----------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "no JSON"),
    "no object": ([1], "has to be an object"),
    "not a number": ({"const": float("nan")}, "no JSON"),
    "NaN in text": ('{"const": NaN}', "NaN is no number"),
    "half a character": ({"const": "\ud800"}, "at '#'"),
    "unknown keyword": (of(a={"colour": 1}), "at '#/properties/a'.*'colour'"),
    "options of the compiler": ({"x-guidance": {"lenient": True}}, "x-guidance"),
    "not": ({"anyOf": [{}, {"not": {}}]}, "at '#/anyOf/1'.*'not'"),
    "if": ({"if": {}, "then": {}}, "'if'"),
    "uniqueItems": (of(a={"items": {"uniqueItems": True}}), "'#/properties/a/items'.*'uniqueIt"),
    "contains": ({"contains": {}}, "contains"),
    "unknown format": (of(a={"type": "string", "format": "foo"}), "'#/properties/a'.*foo"),
    "unknown type": (of(a={"type": "fish"}), "'#/properties/a'.*fish"),
    "oneOf that overlaps": (of(a={"oneOf": [{"type": "string"}, {"const": "x"}]}), "/a'.*anyOf"),
    "look-ahead": (of(a={"type": "string", "pattern": "(?=a)"}), "'#/properties/a'.*look-ahead"),
    "within a slash": (of(**{"a/b": {"not": {}}}), "'#/properties/a~1b'"),
    "number for a schema": (of(a=3), "'#/properties/a'.*neither"),
    "minimum over maximum": (of(a={"type": "integer", "minimum": 2, "maximum": 1}), "/a'.*minimum"),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 1}, "minLength"),
    "two types": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible"),
    "nothing to choose": ({"enum": []}, "Unsatisfiable"),
    "required and impossible": (
        {"type": "object", "required": ["a"], "additionalProperties": False},
        "required property 'a'",
    ),
    "refers to itself alone": ({"$ref": "#"}, "without an end"),
    "has itself inside": (of(a={"$ref": "#"}), "at '#'.*without an end"),
    "have each other inside": (
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": of(b={"$ref": "#/$defs/b"}), "b": of(a={"$ref": "#/$defs/a"})},
        },
        "without an end",
    ),
    "an endless list": (
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        "without an end",
    ),
    "another file": (of(a={"$ref": "https://example.org/x.json"}), "/a'.*nothing is ever fetched"),
    "file by path": ({"$ref": "file:///etc/passwd"}, "nothing is ever fetched"),
    "an anchor": ({"$ref": "#there"}, "only places within it"),
    "no such place": (of(a={"$ref": "#/$defs/b"}), "'#/properties/a'.*no such place"),
    "deep": (nested(70, text=False), "64 schemas deep"),
    "very deep": (nested(5_000, text=True), "no JSON|too deep"),
    "very deep in Python": (nested(5_000, text=False), "no JSON|too deep"),
    "long": ({"const": "x" * 70_000}, "at most 65,536"),
    "of large numbers": ({"type": "integer", "multipleOf": 999_999_937}, "remainders"),
    "an expression that explodes": (
        closed(a={"type": "string", "pattern": "^(a{1000}){1000}$"}),
        "too complex",
    ),
    "parts that multiply": (
        {"allOf": [{"anyOf": [of(**{f"a{i}{j}": {}}) for j in range(9)]} for i in range(9)]},
        "too large",
    ),
    "many optional properties": (
        {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(1500)}},
        "500 optional properties",
    ),
    "a chain of references": (
        {"$ref": "#/$defs/0", "$defs": {f"{n}": {"$ref": f"#/$defs/{n + 1}"} for n in range(2000)}},
        "no such place|too deep",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_that_cannot_be_used_is_refused(case: str) -> None:
    schema, reason = REFUSED[case]
    begin = time.thread_time()
    with pytest.raises(GrammarError, match=f"(?s){reason}") as refused:
        GRAMMARS.compile(grammar.json_schema(schema))
    assert time.thread_time() - begin < 2
    assert len(str(refused.value)) < 700


# -- and those that can -------------------------------------------------------------------------

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
TAKEN: dict[str, tuple[Any, Any]] = {
    "recursive": (TREE, {"value": 1, "next": {"value": 2}}),
    "mutually, with a way out": (
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]},
                "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1},
            },
        },
        [[None], None],
    ),
    "ten thousand values": ({"enum": list(range(10_000))}, 9_999),
    "any character": ({"enum": ['"\\\n\x00é🙂\u2028/', "\u00e9"]}, '"\\\n\x00é🙂\u2028/'),
    "escapes in its text": ('{"const": "\\u00e9\\ud83d\\ude42"}', "é🙂"),
    "escapes in a reference": (
        {"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"const": 1}}},
        1,
    ),
    "notes": (
        {
            **{"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "t"},
            **{"description": "d", "default": 3, "examples": [1], "x-order": 1, "$comment": "c"},
            "type": "integer",
        },
        7,
    ),
    "false within": (
        {"type": "array", "prefixItems": [{"const": 1}], "items": False, "minItems": 1},
        [1],
    ),
    "oneOf that is apart": ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, 3),
    "format": ({"type": "string", "format": "date"}, "2026-11-28"),
    "long texts": ({"type": "string", "maxLength": 1_000_000}, "ab"),
}


def accepts(processor: GrammarProcessor, text: str) -> bool:
    """Whether a text, and its end, is what a processor allows."""
    ids = [1, *tokenizer.encode(text)]
    processor = processor.copy()
    processor(torch.tensor([[1]]), torch.zeros(1, V))
    return not bool(processor(torch.tensor([ids]), torch.zeros(1, V))[0, END].isneginf())


@pytest.mark.parametrize("case", TAKEN)
def test_a_schema_is_followed(case: str) -> None:
    schema, value = TAKEN[case]
    processor = GRAMMARS.compile(grammar.json_schema(schema))
    assert accepts(processor, json.dumps(value, ensure_ascii=False))
    assert accepts(processor, json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    assert not accepts(processor, '{"something": "else"}')


def test_properties_come_in_the_order_of_the_schema() -> None:
    processor = GRAMMARS.compile(grammar.json_schema(of(b={}, a={})))
    assert accepts(processor, '{"b": 1, "a": 2}')
    assert not accepts(processor, '{"a": 2, "b": 1}')


def test_an_object_is_any_object() -> None:
    processor = GRAMMARS.compile(grammar.json_object())
    assert accepts(processor, '{"a": [1, {"b": null}], "c": "d"}')
    assert not accepts(processor, "[1]")
    # A model could go on with these for ever.
    assert not accepts(processor, '{  "a": 1}')


@pytest.mark.usefixtures("no_network")
def test_nothing_is_fetched() -> None:
    for ref in ("http://127.0.0.1:9/x", "//host/x", "x.json"):
        with pytest.raises(GrammarError):
            GRAMMARS.compile(grammar.json_schema({"$ref": ref}))
    named = {"$id": "http://example.org/a", "$ref": "#/$defs/b", "$defs": {"b": {"const": 1}}}
    assert accepts(GRAMMARS.compile(grammar.json_schema(named)), "1")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# -- expressions, grammars, choices -------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "taken", "other"),
    [
        (grammar.regex(r"\d{3}/[a-z]+"), "123/ab", "12/ab"),
        (grammar.regex("a\nb"), "a\nb", "a b"),
        (grammar.regex(r"[/\\]+"), "/\\/", "|"),
        (grammar.regex('"x"#'), '"x"#', "x"),
        (grammar.regex(""), "", "a"),
        (grammar.choice(["yes", 'n"\\\no', "", "\x01é🙂"]), 'n"\\\no', "no"),
        (grammar.choice([f"choice {n}" for n in range(4_000)]), "choice 3999", "choice 4000"),
        (grammar.lark('start: "a" b*\nb: "(" b ")" | /[0-9]/'), "a((1))2", "a((1)2"),
        (grammar.lark('start: "x=" %json {"type": "boolean"}'), "x=true", "x=1"),
    ],
)
def test_a_text_is_what_was_asked_for(constraint: Constraint, taken: str, other: str) -> None:
    processor = GRAMMARS.compile(constraint)
    assert accepts(processor, taken)
    assert not accepts(processor, other)


BOMBS = ["a{1000000}", "(a{1000}){1000}", "((a{100}){100}){100}", "(a?){10000}a{10000}"]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("around", ["{}", "b{}", "({}|b)c"])
def test_an_expression_that_explodes_is_refused_at_once(pattern: str, around: str) -> None:
    begin = time.thread_time()
    with pytest.raises(GrammarError, match="too complex"):
        GRAMMARS.compile(grammar.regex(around.replace("{}", pattern)))
    assert time.thread_time() - begin < 2


@pytest.mark.parametrize("pattern", ["(x+x+)+y", "(a*)*b", "(.*a.{20})", "(a|aa)*c", "(.*)(.*)x"])
def test_expressions_that_other_engines_choke_on_are_read(pattern: str) -> None:
    begin = time.thread_time()
    at_random(GRAMMARS.compile(grammar.regex(pattern)), V, END, 1, most=40)
    assert time.thread_time() - begin < 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: grammar.regex("("), "unclosed group"),
        (lambda: grammar.regex("(?=a)b"), "look-around"),
        (lambda: grammar.regex(r"(a)\1"), "backreferences"),
        (lambda: grammar.regex("(" * 5_000 + ")" * 5_000), "expression"),
        (lambda: grammar.regex(r"[^\s\S]"), "no text at all"),
        (lambda: grammar.regex("x" * 70_000), "at most 65,536"),
        (lambda: grammar.regex("\ud800"), "half of a character"),
        (lambda: grammar.regex(3), "has to be a text"),
        (lambda: grammar.lark(""), "grammar"),
        (lambda: grammar.lark("start: other"), 'unknown name: "other"'),
        (lambda: grammar.lark("start: a\na: a"), "no text at all"),
        (lambda: grammar.lark("start: <|nothing|>"), "special token"),
        (lambda: grammar.lark("start: <[99999]>"), "too large"),
        (lambda: grammar.lark("start: " + "(" * 5_000 + '"a"' + ")" * 5_000), "nested"),
        (lambda: grammar.choice([]), "at least one"),
        (lambda: grammar.choice("abc"), "list of texts"),
        (lambda: grammar.choice([1]), "list of texts"),
    ],
)
def test_what_is_wrong_is_said(make: Any, reason: str) -> None:
    with pytest.raises(GrammarError, match=f"(?s){reason}") as refused:
        GRAMMARS.compile(make())
    assert len(str(refused.value)) < 600


# -- compiled once, for whoever asks ------------------------------------------------------------


def test_valid_and_invalid_ones_take_turns() -> None:
    for number in range(100):
        name = f"k{number % 3}"
        processor = GRAMMARS.compile(grammar.json_schema(of(**{name: {"const": number}})))
        assert accepts(processor, json.dumps({name: number}))
        with pytest.raises(GrammarError, match=name):
            GRAMMARS.compile(grammar.json_schema(of(**{name: {"type": "fish"}})))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were compiled, one after another."""
    found: list[str] = []
    once = Compiled._new_matcher

    def counted(self: Any) -> Any:
        found.append(self._grammar)
        return once(self)

    monkeypatch.setattr(Compiled, "_new_matcher", counted)
    return found


def test_the_last_ones_are_kept(made: list[str]) -> None:
    few = Grammars(tokenizer, V, kept=2)
    for pattern in ("a", "b", "a", "c", "a", "b"):
        few.compile(grammar.regex(pattern))
    assert len(made) == 4


GROWS = grammar.regex("(.*a.{200}b)+")


def test_a_lexer_that_remembers_too_much_begins_anew(made: list[str]) -> None:
    processor = Grammars(tokenizer, V).compile(GROWS)
    written = at_random(processor, V, END, 1, most=500)
    assert len(written) == 500
    assert len(made) > 1
    # What came before is followed still.
    fresh = processor.copy()
    fresh(torch.tensor([[1, 2, 3]]), torch.zeros(1, V))
    assert fresh.accepted(0, torch.tensor([1, 2, 3]), written[:400]) == 400


def test_what_has_grown_most_is_not_kept(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "FOLLOWED", 20)
    few, long, short = Grammars(tokenizer, V), grammar.regex("[^a]{60}"), grammar.choice(["one"])
    at_random(few.compile(short), V, END, 1)
    assert len(at_random(few.compile(long), V, END, 1)) > 20
    few.compile(short)
    assert len(made) == 2
    few.compile(long)
    assert len(made) == 3


def test_many_threads_may_ask() -> None:
    failed: list[Exception] = []

    def ask(seed: int) -> None:
        try:
            for number in range(6):
                constraint = grammar.json_schema(closed(a={"const": number}))
                written = at_random(GRAMMARS.compile(constraint), V, END, seed)
                assert json.loads(tokenizer.decode(written[:-1])) == {"a": number}
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_does_not_fit_the_tokenizer_is_said() -> None:
    with pytest.raises(InputError, match="no token"):
        GRAMMARS.compile(grammar.regex("a"), after="</think>")
    with pytest.raises(InputError, match="no token"):
        GRAMMARS.compile(grammar.regex("a"), after=V)
    with pytest.raises(InputError, match="eos_token_id"):
        Grammars(tokenizer, V, eos_token_id=V + 1)


def test_any_of_several_ends_may_come() -> None:
    (other,) = tokenizer.encode("|")
    processor = Grammars(tokenizer, V, eos_token_id=[END, other]).compile(grammar.regex("a"))
    processor(torch.tensor([[1]]), torch.zeros(1, V))
    ids = torch.tensor([[1, *tokenizer.encode("a")]])
    allowed = ~processor(ids, torch.zeros(1, V))[0].isneginf()
    assert allowed.nonzero()[:, 0].tolist() == sorted([END, other])
