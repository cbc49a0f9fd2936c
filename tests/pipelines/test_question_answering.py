"""`pipeline("question-answering")`: spans, windows, and what is refused.

Transformers 5 has no such task any more; answers are compared with a search by hand.
"""

from typing import Any

import pytest
import torch

from pipelines.conftest import Made, close
from quintet import pipeline
from quintet.errors import InputError

TASK, HEAD = "question-answering", "ForQuestionAnswering"
QUESTION = "Who jumps over the dog?"
CONTEXT = "Hello there, how are you today? The quick brown fox jumps over the lazy dog."
ASKED = {"question": QUESTION, "context": CONTEXT}
FAMILIES = ("qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2")
Span = tuple[int, int]


def by_hand(
    pipe: Any, longest: int, window: int = 256, stride: int = 0, impossible: bool = False
) -> tuple[list[dict[Span, float]], list[float]]:
    """Score every span of every window, and that each has no answer, the slow way."""
    question = pipe.tokenizer.encode(QUESTION)
    row = pipe.tokenizer(CONTEXT).encodings[0]
    room = window - len(question)
    windows, none = [], []
    for begin in range(0, len(row.ids), room - stride):
        ids, offsets = row.ids[begin : begin + room], row.offsets[begin : begin + room]
        with torch.no_grad():
            output = pipe.model(torch.tensor([question + ids]))
        places = [0] * impossible + list(range(len(question), len(question) + len(ids)))
        first, last = (
            logits[0, places].double().softmax(dim=0)
            for logits in (output.start_logits, output.end_logits)
        )
        if impossible:
            none.append(float(first[0] * last[0]))
            first, last = first[1:], last[1:]
        windows.append(
            {
                (offsets[a][0], offsets[b][1]): float(first[a] * last[b])
                for a in range(len(ids))
                for b in range(a, min(a + longest, len(ids)))
            }
        )
        if begin + room >= len(row.ids):
            break
    return windows, none


def best(spans: dict[Span, float], most: int = 1) -> list[dict[str, Any]]:
    found = sorted(spans.items(), key=lambda one: -one[1])[:most]
    return [
        {"score": score, "start": start, "end": end, "answer": CONTEXT[start:end]}
        for (start, end), score in found
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_likeliest_span_in_every_family(family: str, headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD, family), align_to_words=False)
    ((spans,), _) = by_hand(pipe, 15)
    assert close(pipe(ASKED), best(spans)[0])


@pytest.mark.parametrize("longest", [1, 3, 100])
def test_several_answers_of_a_length(longest: int, headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD), align_to_words=False)
    ((spans,), _) = by_hand(pipe, longest)
    found = pipe(ASKED, top_k=5, max_answer_len=longest)
    assert close(found, best(spans, 5))
    assert len({one["answer"] for one in found}) == 5


def test_answers_are_whole_words_and_twins_add_up(headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD))
    torn = pipe(ASKED, align_to_words=False, top_k=200)
    whole = pipe(ASKED, top_k=200)
    row = pipe.tokenizer(CONTEXT).encodings[0]
    starts, ends = (
        {pick(o[i] for o, w in zip(row.offsets, row.word_ids, strict=True) if w == word)
         for word in set(row.word_ids)}
        for pick, i in ((min, 0), (max, 1))
    )  # fmt: skip
    assert len(whole) < len(torn)
    assert {one["start"] for one in whole} <= starts
    assert {one["end"] for one in whole} <= ends
    assert {one["start"] for one in torn} - starts
    assert sum(one["score"] for one in whole) == pytest.approx(sum(one["score"] for one in torn))


@pytest.mark.parametrize(("window", "stride"), [(26, 0), (30, 5)])
def test_a_long_context_is_read_in_windows(window: int, stride: int, headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD), align_to_words=False)
    windows, _ = by_hand(pipe, 15, window, stride)
    assert len(windows) > 2
    expected: dict[Span, float] = {}
    for spans in windows:
        (one,) = best(spans)
        place = one["start"], one["end"]
        expected[place] = expected.get(place, 0.0) + one["score"]
    options = {"max_seq_len": window, "doc_stride": stride}
    assert close(pipe(ASKED, **options), best(expected)[0])
    assert close(pipe(ASKED, **options, batch_size=3), best(expected)[0])


def test_no_answer_is_an_answer_too(headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD), align_to_words=False)
    for window in (256, 34):
        windows, none = by_hand(pipe, 15, window, impossible=True)
        options = {"max_seq_len": window, "doc_stride": 0, "top_k": 10_000}
        found = pipe(ASKED, **options, handle_impossible_answer=True)
        (empty,) = (one for one in found if one["answer"] == "")
        assert (empty["start"], empty["end"]) == (0, 0)
        assert empty["score"] == pytest.approx(min(none), rel=1e-4)
        assert all(one["answer"] for one in pipe(ASKED, **options))
        if len(windows) == 1:
            rest = [one for one in found if one["answer"]]
            assert close(rest[:5], best(windows[0], 5))


def test_every_way_to_ask(headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD))
    one = pipe(ASKED)
    assert pipe(question=QUESTION, context=CONTEXT) == one
    assert pipe([ASKED]) == [one]
    other = pipe(question="Hello?", context=CONTEXT)
    assert pipe(question=[QUESTION, "Hello?"], context=CONTEXT) == [one, other]
    assert pipe(question=[QUESTION], context=[CONTEXT]) == [one]
    assert list(pipe(ASKED for _ in range(3))) == [one] * 3
    assert close(pipe([ASKED, {**ASKED, "question": "Hello?"}], batch_size=2), [one, other])


def test_a_long_question_is_cut(headed: Made) -> None:
    pipe = pipeline(TASK, headed(HEAD))
    first = pipe.tokenizer.decode(pipe.tokenizer.encode(QUESTION)[:4])
    assert pipe(ASKED, max_question_len=4) == pipe(question=first, context=CONTEXT)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "give a question and its context"),
        (None, {"question": "a"}, "give a question and its context"),
        (ASKED, {"question": "a"}, "not both"),
        (None, {"question": ["a", "b"], "context": ["c"] * 3}, "2 questions and 3 contexts"),
        ({"question": "a"}, {}, "an input has to be"),
        (["a"], {}, "an input has to be"),
        ({"question": "", "context": "b"}, {}, "the question is ''"),
        ({"question": "a", "context": 3}, {}, "the context is 3"),
        (ASKED, {"top_k": 0}, "top_k=0"),
        (ASKED, {"max_answer_length": 3}, "did you mean 'max_answer_len'"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    inputs: Any, options: dict[str, Any], message: str, headed: Made
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(TASK, headed(HEAD))(inputs, **options)
