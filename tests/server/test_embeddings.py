"""Vectors over HTTP."""

import base64
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from served import Running, serving

TEXTS = ["def f():", "import os"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as it:
        yield it


def vectors(server: Running, given: Any, **fields: Any) -> list[list[float]]:
    answer = server.ask("POST", "/v1/embeddings", {"model": "demo", "input": given, **fields})
    assert answer.status == 200
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def test_a_text_its_ids_and_lists_of_them_give_the_same_vectors(server: Running) -> None:
    tokenizer = server.service.registry.offers[0].loaded.tokenizer  # type: ignore[union-attr]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    both = vectors(server, TEXTS)
    assert vectors(server, ids) == both
    assert [vectors(server, text)[0] for text in TEXTS] == both
    assert vectors(server, ids[0]) == both[:1]
    assert both[0] != both[1]


def test_vectors_have_the_length_of_one_unless_asked_otherwise(server: Running) -> None:
    (one,) = vectors(server, TEXTS[0])
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-5)
    (raw,) = vectors(server, TEXTS[0], normalize=False)
    size = sum(x * x for x in raw) ** 0.5
    assert [x / size for x in raw] == pytest.approx(one, abs=1e-5)
    assert vectors(server, TEXTS[0], pooling="mean") != [one]


def test_base64_is_the_same_in_float32_of_the_lowest_byte_first(server: Running) -> None:
    (one,) = vectors(server, TEXTS[0])
    (packed,) = vectors(server, TEXTS[0], encoding_format="base64")
    assert isinstance(packed, str)
    assert list(struct.unpack(f"<{len(one)}f", base64.b64decode(packed))) == one


def test_tokens_are_counted(server: Running) -> None:
    answer = server.ask("POST", "/v1/embeddings", {"model": "demo", "input": [[5, 6], [7]]})
    assert answer.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_control_tokens_that_are_written_stay_text(server: Running) -> None:
    tokenizer = server.service.registry.offers[0].loaded.tokenizer  # type: ignore[union-attr]
    text = tokenizer.eos_token
    answer = server.ask("POST", "/v1/embeddings", {"model": "demo", "input": text})
    plain = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in plain
    assert answer.json()["usage"]["prompt_tokens"] == len(plain)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", [1]]}, "input[1]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [10**30]}, "input[0]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [True]}, "input[0]"),
        ({"input": [[1, 10**9]]}, "input[0][1]"),
        ({"input": [{}]}, "input[0]"),
        ({"input": [None]}, "input[0]"),
        ({"input": ["a"] * 129}, "input"),
        ({"input": [5] * 1000}, "input"),
        ({"input": "word " * 5000}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"normalize": 1}, "normalize"),
        ({"model": 3}, "model"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_place(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "demo", "input": "a", **fields}
    answer = server.ask("POST", "/v1/embeddings", body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert len(answer.body) < 2000
