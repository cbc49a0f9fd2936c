"""Text to tokens and back over HTTP, as lm-eval asks for it."""

from collections.abc import Iterator

import pytest

from quintet import AutoTokenizer, demo_model
from served import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as it:
        yield it


def test_a_text_comes_back(server: Running) -> None:
    text = "def f(x):\n    return '🙂 é'\n"
    asked = server.ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    ids = AutoTokenizer.from_pretrained(demo_model()).encode(text, add_special_tokens=False)
    assert asked.json() == {
        "count": len(ids),
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": None,
    }
    assert server.ask("POST", "/detokenize", {"tokens": ids}).json() == {"prompt": text}


def test_what_lm_eval_needs_is_told(server: Running) -> None:
    told = server.ask("GET", "/tokenizer_info").json()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert told["eos_token"] == tokenizer.eos_token
    assert {"bos_token", "pad_token", "chat_template", "model_max_length"} <= told.keys()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ x }}"}, "chat_template"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "word " * 5000}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1] * 2000}, "tokens"),
    ],
)
def test_what_cannot_be_used_is_named(server: Running, path: str, body: object, param: str) -> None:
    answer = server.ask("POST", path, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert len(answer.body) < 10_000


def test_a_model_that_is_not_there_is_said(server: Running) -> None:
    assert server.ask("POST", "/tokenize", {"prompt": "a", "model": "other"}).status == 404
    assert server.ask("GET", "/tokenizer_info?model=other").status == 404
