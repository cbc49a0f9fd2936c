"""Answers in a form: `--json-schema` and `--regex`."""

import json
from pathlib import Path
from typing import Any

import pytest

from quintet.cli.shaping import AnswerShape
from quintet.errors import InputError

SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.mark.parametrize("how", [(), ("--json",)], ids=["shown", "json"])
def test_a_text_is_continued_in_a_form(
    quintet: Any, chat_model: Path, schema: Path, how: tuple[str, ...]
) -> None:
    result = quintet("generate", "Hello", "-m", chat_model, "--json-schema", schema, *how)
    assert result.code == 0
    text = json.loads(result.out)["text"] if how else result.out.removeprefix("Hello")
    assert set(json.loads(text)) == {"yes"}
    asked = ("generate", "Hello", "-m", chat_model, "--regex", "[a-c]{3}", "--no-echo")
    assert quintet(*asked).out.strip().strip("abc") == ""


def test_every_answer_of_a_conversation_has_it(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "--regex", "(yes|no)!", stdin="Is it?\nAnd now?\n")
    assert result.code == 0
    answers = result.out.split()
    assert len(answers) == 2
    assert set(answers) <= {"yes!", "no!"}


@pytest.mark.parametrize("content", ["{", "[" * 10_000, "1" * 5_000])
def test_a_schema_that_is_no_json_is_named(
    quintet: Any, chat_model: Path, content: str, tmp_path: Path
) -> None:
    (tmp_path / "s.json").write_text(content)
    result = quintet("generate", "Hello", "-m", chat_model, "--json-schema", tmp_path / "s.json")
    assert result.code == 2
    assert "JSON" in result.err
    with pytest.raises(InputError, match="no JSON"):
        _ = AnswerShape(schema=content).fields


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--regex", "("), 2, "unclosed group"),
        (("--regex", "a", "--json-schema", "x.json"), 2, "two forms"),
        (("--json-schema", "nowhere.json"), 3, "no file"),
    ],
)
def test_what_is_wrong_is_said(
    quintet: Any, chat_model: Path, arguments: tuple[str, ...], code: int, reason: str
) -> None:
    for command in (("generate", "Hello", "-m"), ("chat",)):
        result = quintet(*command, chat_model, *arguments)
        assert result.code == code
        assert reason in result.err


def test_files_of_texts_have_no_form(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "-m", chat_model, "--batch", "-", "--regex", "a", stdin='"a"\n')
    assert result.code == 2
    assert "one by one" in result.err


def test_a_server_is_asked_for_it() -> None:
    assert AnswerShape().fields == {}
    assert AnswerShape(pattern="a").fields == {"regex": "a"}
    asked = AnswerShape(json.dumps(SCHEMA)).fields["response_format"]
    assert asked["json_schema"]["schema"] == SCHEMA
