"""`/v1/completions`: texts that go on, alone and in lists, whole and as they are written."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quintet import PreTrainedTokenizerFast, Qwen2ForCausalLM
from quintet.server.protocol.completions import CompletionRequest, pieces
from quintet.server.settings import Settings
from quintet.serving import Limits
from served import Running
from server.talking import CONTEXT, HOLES, chat_tokenizer, chunks, talking

Served = tuple[Running, Qwen2ForCausalLM, PreTrainedTokenizerFast]
PATH = "/v1/completions"
TEXT = "def fibonacci(n):\n    return"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with talking() as it:
        yield it


def done(served: Served, **body: Any) -> dict[str, Any]:
    answer = served[0].ask("POST", PATH, {"model": "tiny", "temperature": 0, **body})
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def streamed(served: Served, **body: Any) -> list[dict[str, Any]]:
    return chunks(served[0], PATH, {"model": "tiny", "temperature": 0, **body})


def alone(served: Served, prompt: Any, **options: Any) -> str:
    _, model, tokenizer = served
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    inputs = torch.tensor([ids])
    made = model.generate(inputs, do_sample=False, **options)[0, len(ids) :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_a_text_goes_on_as_generate_has_it(served: Served) -> None:
    whole = done(served, prompt=TEXT, max_tokens=24)
    [choice] = whole["choices"]
    assert choice["text"] == alone(served, TEXT, max_new_tokens=24)
    assert (choice["finish_reason"], choice["index"]) == ("length", 0)
    assert whole["object"] == "text_completion"
    assert whole["system_fingerprint"] == "fp_test"
    assert whole["usage"]["completion_tokens"] == 24
    assert len(done(served, prompt=TEXT)["choices"][0]["text"]) > 0
    assert done(served, prompt=TEXT)["usage"]["completion_tokens"] == 16
    parts = streamed(served, prompt=TEXT, max_tokens=24)
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts][-2:] == [None, "length"]
    assert all(part["id"] == parts[0]["id"] and "usage" not in part for part in parts)


def test_prompts_may_be_several_and_ids(served: Served) -> None:
    tokenizer = served[2]
    texts = ["Hello there", TEXT, "Be brief"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = [alone(served, text, max_new_tokens=6) for text in texts]
    for prompt in (texts, ids):
        whole = done(served, prompt=prompt, max_tokens=6, n=2)
        assert [one["index"] for one in whole["choices"]] == list(range(6))
        assert [one["text"] for one in whole["choices"]][::2] == expected
        assert whole["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert whole["usage"]["completion_tokens"] == 36
    assert done(served, prompt=ids[0], max_tokens=6)["choices"][0]["text"] == expected[0]
    parts = streamed(served, prompt=texts, max_tokens=6, stream_options={"include_usage": True})
    *parts, last = parts
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 18
    assert all(part["usage"] is None for part in parts)
    for index, text in enumerate(expected):
        own = [c["text"] for part in parts for c in part["choices"] if c["index"] == index]
        assert "".join(own) == text


def test_an_echo_has_the_scores_of_its_prompt(served: Served) -> None:
    _, model, tokenizer = served
    text = "Hello naïve 你好 there"
    ids = tokenizer(text)["input_ids"]
    for prompt in (text, ids):
        whole = done(served, prompt=prompt, max_tokens=1, echo=True, logprobs=1)
        [choice] = whole["choices"]
        assert choice["text"].startswith(text)
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(ids) + 1
        assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = logits[range(len(ids) - 1), ids[1:]]
        assert scores["token_logprobs"][1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
        for taken, top in zip(
            scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True
        ):
            assert taken in top.values()
            assert taken <= max(top.values())
        offsets = scores["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
        assert offsets[-1] == len(text)
        only = done(served, prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]
        assert only["text"] == text
        assert only["logprobs"]["token_logprobs"] == scores["token_logprobs"][:-1]
        assert [len(top) for top in only["logprobs"]["top_logprobs"][1:]] == [1] * (len(ids) - 1)
    parts = streamed(served, prompt=text, max_tokens=1, echo=True, logprobs=1)
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    found = [p["choices"][0]["logprobs"] for p in parts if p["choices"][0]["logprobs"]]
    assert [s for own in found for s in own["token_logprobs"]] == scores["token_logprobs"]


def test_nothing_ends_a_text_before_the_least_it_has_to_have(served: Served) -> None:
    """Neither what the model ends with nor a text that is to end it."""
    whole = done(served, prompt=TEXT, max_tokens=30)["choices"][0]
    stop = whole["text"][1:3]
    assert (
        done(served, prompt=TEXT, max_tokens=30, stop=stop)["choices"][0]["text"] != whole["text"]
    )
    longer = done(served, prompt=TEXT, max_tokens=30, stop=stop, min_tokens=30)
    assert longer["usage"]["completion_tokens"] == 30
    assert longer["choices"][0]["text"] == whole["text"]


def test_a_stop_string_is_cut_exactly(served: Served) -> None:
    text = alone(served, TEXT, max_new_tokens=40)
    for start, end in ((3, 4), (5, 9), (11, 12)):
        stop = text[start:end]
        expected = text[: text.index(stop)]
        whole = done(served, prompt=TEXT, max_tokens=40, stop=["\0", stop], logprobs=0)
        assert whole["choices"][0]["text"] == expected
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert max(whole["choices"][0]["logprobs"]["text_offset"]) <= len(expected)
        parts = streamed(served, prompt=TEXT, max_tokens=40, stop=stop)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected


def test_a_hole_is_asked_for_by_the_tokens_of_the_model(served: Served) -> None:
    refused = served[0].ask("POST", PATH, {"model": "tiny", "prompt": "a", "suffix": "b"})
    assert (refused.status, refused.error["code"]) == (400, "unsupported_parameter")
    assert refused.error["param"] == "suffix"


def test_a_hole_is_written_around(served: Served) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": HOLES})
    body = CompletionRequest(model="m", prompt="def f(<|im_end|>", suffix="return x")
    [piece] = pieces(body, tokenizer, Settings(), 100, len(tokenizer))
    first, hole, last = (tokenizer.convert_tokens_to_ids(one) for one in HOLES)
    ids = list(piece.ids)
    assert (ids[0], ids[-1]) == (first, last)
    at = ids.index(hole)
    assert tokenizer.decode(ids[1:at]) == "def f(<|im_end|>"
    assert tokenizer.decode(ids[at + 1 : -1]) == "return x"
    assert tokenizer.eos_token_id not in ids


def test_ids_without_a_token_are_taken(served: Served) -> None:
    size = served[1].config.vocab_size
    assert size > len(served[2])
    whole = done(served, prompt=[50, size - 1], max_tokens=2, echo=True, logprobs=2)
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 4
    refused = served[0].ask("POST", PATH, {"model": "tiny", "prompt": [size]})
    assert refused.status == 400


def test_more_answers_than_may_wait_are_made_one_after_the_other() -> None:
    with talking(limits=Limits(rows=2, queue=0, capacity=CONTEXT)) as served:
        whole = done(served, prompt=["Hello", TEXT, "Be"] * 4, n=3, max_tokens=2)
        assert [one["index"] for one in whole["choices"]] == list(range(36))
        assert whole["usage"]["completion_tokens"] == 72
