"""`pipeline("question-answering")`: the words of a text that answer a question.

A model says of each token how likely the answer starts, and ends, there; the best pairs of a
start and an end are the answers (arXiv:1810.04805, §4.2). Transformers had this task up to
version 4, and its results are the ones here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintet.configuration.constraints import Length
from quintet.errors import InputError
from quintet.pipelines.base import Pipeline, checked_scores, unpadded

LONGEST_WINDOW = 384
LONGEST_STRIDE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of question answering.

    Attributes:
        top_k: how many answers, likeliest first; one alone is not put into a list.
        max_answer_len: how many tokens an answer has at the most.
        max_seq_len: tokens of a window, with its question; at most 384 if not given.
        doc_stride: tokens that windows share; half a window, at most 128, if not given.
        handle_impossible_answer: also weigh that the text has no answer, which is a start and an
            end at the very first token.
        align_to_words: answers begin and end with whole words.
        max_question_len: how many tokens of a question are read.
    """

    top_k: Length = 1
    max_answer_len: Length = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    max_question_len: Length = 64


@dataclass(frozen=True, slots=True)
class ContextWindow:
    """A window of the context behind the question; `spans` is None outside of the context."""

    context: str
    ids: list[int]
    spans: list[tuple[int, int] | None]


class QuestionAnsweringPipeline(Pipeline):
    """Finds answers in texts.

    An input is `{"question": …, "context": …}`; a single one can be given by these names. A result
    is `{"score": …, "start": …, "end": …, "answer": …}`, and several are a list.

    The question always comes first: the tokens of a context behind it have read it, which those
    before it cannot in a model that reads from left to right.
    """

    task = "question-answering"
    suffix = "ForQuestionAnswering"
    options_class = Options

    def __call__(
        self,
        inputs: Any = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Answer one question, a list, or a stream of them; see `Options`."""
        if inputs is None:
            inputs = _pairs(question, context)
        elif question is not None or context is not None:
            raise InputError("give inputs, or question and context, not both")
        return super().__call__(inputs, batch_size=batch_size, **options)

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one question."""
        return isinstance(inputs, Mapping)

    def preprocess(self, item: Any, options: Options) -> Sequence[ContextWindow]:
        """Cut the context into windows, each behind the question."""
        question, context = _question_and_context(item)
        size = min(options.max_seq_len or LONGEST_WINDOW, self.longest)
        stride = options.doc_stride
        stride = min(size // 2, LONGEST_STRIDE) if stride is None else stride
        tokens = self.tokenizer(
            question, truncation=True, max_length=options.max_question_len, add_special_tokens=False
        )
        question = question[: tokens.encodings[0].offsets[-1][1]] if tokens.encodings else question
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=size,
            stride=stride,
            return_overflowing_tokens=True,
        )
        return [self._part(context, row, options) for row in encoded.encodings or []]

    def forward(self, parts: list[ContextWindow], options: Options) -> list[tuple[Tensor, Tensor]]:
        """Return the logits of starts and of ends (T,) of each window."""
        output, lengths = self.run([part.ids for part in parts])
        starts = unpadded(output.start_logits, lengths)
        return list(zip(starts, unpadded(output.end_logits, lengths), strict=True))

    def postprocess(
        self, parts: Sequence[ContextWindow], outputs: list[tuple[Tensor, Tensor]], options: Options
    ) -> Any:
        """Return the best answers of all windows; the same words found twice add up."""
        scores: dict[tuple[int, int, str], float] = {}
        impossible = 1.0
        for part, (starts, ends) in zip(parts, outputs, strict=True):
            inside = torch.tensor(
                [span is not None for span in part.spans], dtype=torch.bool, device="cpu"
            )
            if options.handle_impossible_answer:
                inside[0] = True
            start, end = (_probabilities(logits, inside) for logits in (starts, ends))
            if options.handle_impossible_answer:
                impossible = min(impossible, float(start[0] * end[0]))
                start[0] = end[0] = 0.0
            for first, last, score in _spans(start, end, options):
                place = part.spans[first], part.spans[last]
                if place[0] is None or place[1] is None:
                    continue
                key = place[0][0], place[1][1], part.context[place[0][0] : place[1][1]]
                twin = next((known for known in scores if known[2].lower() == key[2].lower()), key)
                scores[twin] = scores.get(twin, 0.0) + score
        answers: list[dict[str, Any]] = [
            {"score": score, "start": start, "end": end, "answer": text}
            for (start, end, text), score in scores.items()
        ]
        if options.handle_impossible_answer:
            answers.append({"score": impossible, "start": 0, "end": 0, "answer": ""})
        answers.sort(key=lambda one: one["score"], reverse=True)
        answers = answers[: options.top_k]
        return answers[0] if len(answers) == 1 else answers

    def _part(self, context: str, row: Any, options: Options) -> ContextWindow:
        spans: list[tuple[int, int] | None] = []
        words: dict[int, tuple[int, int]] = {}
        columns = list(zip(row.sequence_ids, row.word_ids, row.offsets, strict=True))
        for sequence, word, (start, end) in columns:
            if sequence == 1 and word is not None:
                known = words.get(word, (start, end))
                words[word] = min(known[0], start), max(known[1], end)
        for sequence, word, offset in columns:
            if sequence != 1:
                spans.append(None)
            elif options.align_to_words and word is not None:
                spans.append(words[word])
            else:
                spans.append(offset)
        return ContextWindow(context, row.ids, spans)


def _pairs(question: Any, context: Any) -> Any:
    """Pair a question with a context, or each question of a list with its own."""
    if question is None or context is None:
        raise InputError('give a question and its context: pipe(question="…", context="…")')
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    # One of the two may be the same for all.
    many = max(1 if isinstance(one, str) else len(one) for one in (question, context))
    questions, contexts = (
        [one] * many if isinstance(one, str) else list(one) for one in (question, context)
    )
    if len(questions) != len(contexts):
        raise InputError(
            f"there are {len(questions)} questions and {len(contexts)} contexts; give as many, "
            "or one context for all"
        )
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]


def _question_and_context(item: Any) -> tuple[str, str]:
    if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
        raise InputError(
            f'an input has to be {{"question": …, "context": …}}, not {type(item).__name__}'
        )
    for name in ("question", "context"):
        if not isinstance(item[name], str) or not item[name]:
            raise InputError(f"the {name} is {item[name]!r}; it has to be a text that is not empty")
    return item["question"], item["context"]


def _probabilities(logits: Tensor, inside: Tensor) -> Tensor:
    return torch.softmax(checked_scores(logits).double().masked_fill(~inside, -10_000.0), dim=0)


def _spans(start: Tensor, end: Tensor, options: Options) -> Iterable[tuple[int, int, float]]:
    """Yield the best pairs of a start and an end that is not before it nor too far away."""
    scores = torch.outer(start, end).triu().tril(options.max_answer_len - 1)
    best = scores.flatten().topk(min(options.top_k, scores.numel()))
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        first, last = divmod(place, len(end))
        if first <= last < first + options.max_answer_len:
            yield first, last, score
