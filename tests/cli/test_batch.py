"""`quintet generate --batch`: a line in, a line out, in order, errors in their places."""

import json
from pathlib import Path
from typing import Any

import pytest

from quintet import AutoModelForCausalLM, AutoTokenizer

LINES = [
    '"Hello there"',
    '{"prompt": "def fibonacci(n):", "id": "b"}',
    "{not json",
    '{"messages": [{"role": "user", "content": "Hello"}], "id": 3}',
    '{"prompt": ""}',
    "",
    '{"text": "a"}',
    '{"prompt": 5}',
    json.dumps({"prompt": "Hello " * 400}),
    '"a"',
]
GOOD = (0, 1, 3, 9)


@pytest.fixture(scope="module")
def parts(chat_model: Path) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    return model, AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def continued(parts: Any, ids: list[int], new: int) -> str:
    import torch

    model, tokenizer = parts
    out = model.generate(torch.tensor([ids]), max_new_tokens=new)
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("size", [1, 20])
def test_a_lines_own_options_hold_for_it_alone(
    quintet: Any, chat_model: Path, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "Hello there", "id": 1},
        {"prompt": "Hello there", "id": 2, "max_new_tokens": 4},
        {"prompt": "Hello there", "id": 3, "temperature": 5.0, "max_new_tokens": 9},
        {"prompt": "Hello there", "id": 4, "top_p": 7},
        {"prompt": "Hello there", "id": 5, "max_new_tokens": 4, "temperature": 0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    asked = ["generate", "--batch", path, "-m", chat_model, "-n", 12, "--seed", 3]
    rows = [json.loads(r) for r in quintet(*asked, "--batch-size", size).out.splitlines()]
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
    assert "top_p" in rows[3]["error"]["message"]
    assert [row.get("new_tokens") for row in rows] == [12, 4, 9, None, 4]
    assert rows[0]["text"].startswith(rows[1]["text"])
    assert rows[1]["text"] == rows[4]["text"]
    assert not rows[0]["text"].startswith(rows[2]["text"])
    assert "max_new_tokens" not in rows[1]


@pytest.mark.parametrize("size", [1, 3, 20])
def test_every_line_is_answered_in_its_place(
    quintet: Any, chat_model: Path, parts: Any, lines: Path, size: int
) -> None:
    asked = ["generate", "--batch", lines, "-m", chat_model, "-n", 8]
    result = quintet(*asked, "--batch-size", size)
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    by_index = {row["index"]: row for row in rows}
    assert {i for i, row in by_index.items() if "error" not in row} == set(GOOD)
    _, tokenizer = parts
    chat = json.loads(LINES[3])["messages"]
    for index, ids in {
        0: tokenizer.encode("Hello there"),
        1: tokenizer.encode("def fibonacci(n):"),
        3: tokenizer.apply_chat_template(chat, add_generation_prompt=True),
        9: tokenizer.encode("a"),
    }.items():
        row = by_index[index]
        assert row["text"] == continued(parts, ids, 8)
        assert (row["prompt_tokens"], row["new_tokens"]) == (len(ids), 8)
        assert row["finish_reason"] == "length"
    assert (by_index[1]["id"], by_index[3]["id"]) == ("b", 3)
    for index, said in {
        2: "not JSON",
        4: "the prompt is empty",
        6: "prompt or messages",
        7: "the prompt is 5",
        8: "the model's context is 256",
    }.items():
        assert by_index[index]["error"]["type"] == "InputError"
        assert said in by_index[index]["error"]["message"]
    assert result.code == 1
    assert "5 lines failed" in result.err


def test_a_line_that_no_parser_takes_fails_alone(quintet: Any, chat_model: Path) -> None:
    lines = "\n".join(["[" * 10_000, "1" * 5_000, '"a"'])
    result = quintet("generate", "--batch", "-", "-m", chat_model, "-n", 4, stdin=lines)
    rows = [json.loads(row) for row in result.out.splitlines()]
    assert ["not JSON" in row.get("error", {}).get("message", "") for row in rows] == [1, 1, 0]


def test_all_is_well_without_an_error(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "--batch", "-", "-m", chat_model, "-n", 4, stdin='"a"\n"b"\n')
    assert result.code == 0
    assert len(result.out.splitlines()) == 2


def test_sampling_does_not_depend_on_the_batch(quintet: Any, chat_model: Path) -> None:
    asked = ["generate", "--batch", "-", "-m", chat_model, "-n", 8, "-t", 2, "--seed", 7]
    stdin = '"Hello there"\n"a"\n"def fibonacci(n):"\n'
    together = quintet(*asked, stdin=stdin)
    assert together.out == quintet(*asked, "--batch-size", 1, stdin=stdin).out
    texts = [json.loads(line)["text"] for line in together.out.splitlines()]
    other = quintet(*asked[:-1], 8, stdin=stdin)
    assert texts != [json.loads(line)["text"] for line in other.out.splitlines()]


def test_json_of_one_text(quintet: Any, chat_model: Path, parts: Any) -> None:
    result = quintet("generate", "Hello there", "--json", "-m", chat_model, "-n", 8)
    (line,) = result.out.splitlines()
    row = json.loads(line)
    ids = parts[1].encode("Hello there")
    assert row["text"] == continued(parts, ids, 8)
    assert row["prompt"] == "Hello there"
    assert (row["prompt_tokens"], row["new_tokens"]) == (len(ids), 8)
    assert (row["finish_reason"], row["seed"]) == ("length", None)
    assert row["seconds"] > 0


def test_a_stop_text_ends_the_answer(quintet: Any, chat_model: Path, parts: Any) -> None:
    text = continued(parts, parts[1].encode("Hello there"), 20)
    stop = text[5:8]
    result = quintet(
        "generate", "Hello there", "--json", "-m", chat_model, "-n", 20, "--stop", stop
    )
    row = json.loads(result.out)
    assert row["finish_reason"] == "stop"
    assert stop in row["text"]
    assert len(row["text"]) < len(text)


def test_a_prompt_from_a_file(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Hello there", encoding="utf-8")
    typed = quintet("generate", "Hello there", "-m", chat_model, "-n", 8)
    assert quintet("generate", "--file", path, "-m", chat_model, "-n", 8).out == typed.out
    piped = quintet("generate", "-f", "-", "-m", chat_model, "-n", 8, stdin="Hello there")
    assert piped.out == typed.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["Hello", "--file", "x"], 2, "PROMPT and --file are two prompts"),
        (["--batch", "x", "--file", "y"], 2, "--file and --batch are two prompts"),
        (["--file", "nowhere.txt"], 3, "there is no file 'nowhere.txt'"),
        (["--batch", "nowhere.jsonl"], 3, "there is no file 'nowhere.jsonl'"),
        (["--batch-sze", "3", "a"], 2, "No such option"),
    ],
    ids=str,
)
def test_misuse_is_told_before_a_model_is_loaded(
    quintet: Any, arguments: list[str], code: int, said: str
) -> None:
    result = quintet("generate", *arguments, "-m", "no/such-model")
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert result.is_one_screen


def test_a_file_that_is_no_text(quintet: Any, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe\x00")
    result = quintet("generate", "--file", path)
    assert result.code == 2
    assert "is not UTF-8 text" in result.err


def test_a_lines_seed_and_short_names(quintet: Any, chat_model: Path) -> None:
    lines = [
        {"prompt": "Hello", "seed": 5},
        {"prompt": "Hello", "seed": 5},
        {"prompt": "Hello"},
        {"prompt": "Hello", "max_tokens": 3, "stop": ["zzz"]},
        {"prompt": "Hello", "seed": "x"},
        {"prompt": "Hello", "max_new_token": 3},
    ]
    asked = ["generate", "--batch", "-", "-m", chat_model, "-t", 3, "-n", 9, "--seed", 1]
    result = quintet(*asked, stdin="\n".join(map(json.dumps, lines)))
    first, again, other, short, no_seed, mistyped = map(json.loads, result.out.splitlines())
    assert first["text"] == again["text"] != other["text"]
    assert short["new_tokens"] == 3
    assert "seed='x' has to be a whole number" in no_seed["error"]["message"]
    assert "did you mean 'max_new_tokens'?" in mistyped["error"]["message"]
