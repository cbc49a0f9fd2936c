"""`pipeline("token-classification")`: a label for each token, or for each thing that is named."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.pipelines.base import Pipeline, checked_scores, unpadded

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of token classification.

    Attributes:
        aggregation_strategy: "none", a label for each token; "simple", neighbours of one label
            together; and so that words are not torn apart, the label of a word is that of its
            "first" token, of the "average" of its tokens, or of the surest one ("max").
        ignore_labels: what is left out.
        stride: read a text longer than the model's context in windows that share that many tokens.
        is_split_into_words: an input is a list of words.
        delimiter: what stands between them in the text that `start` and `end` count in.
    """

    aggregation_strategy: str = "none"
    ignore_labels: Sequence[str] = ("O",)
    stride: int | None = None
    is_split_into_words: bool = False
    delimiter: str = " "

    def __post_init__(self) -> None:
        if self.aggregation_strategy.lower() not in STRATEGIES:
            raise InputError(
                f"aggregation_strategy={self.aggregation_strategy!r} has to be one of {STRATEGIES}"
            )
        if self.stride is not None and self.aggregation_strategy.lower() == "none":
            raise InputError(
                "stride needs an aggregation_strategy other than 'none': tokens that two windows "
                "share would come twice"
            )

    @property
    def strategy(self) -> str:
        """The way in which tokens are grouped."""
        return self.aggregation_strategy.lower()


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text: its spelling, its place, and its scores (num_labels,)."""

    word: str
    start: int
    end: int
    index: int
    continues: bool
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Entity:
    """Something that has a label: a token, a word, or several."""

    label: str
    score: float
    tokens: tuple[Token, ...]

    @property
    def tag(self) -> str:
        """The label without its mark of beginning or inside."""
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label


@dataclass(frozen=True, slots=True)
class TextWindow:
    """A window of a text; `places` holds None for tokens that the tokenizer added."""

    text: str
    ids: list[int]
    places: list[tuple[int, int] | None]


class TokenClassificationPipeline(Pipeline):
    """Labels the tokens of texts.

    A result is a list of `{"entity": …, "score", "index", "word", "start", "end"}`; with an
    aggregation strategy `"entity_group"` is in place of entity and index.
    """

    task = "token-classification"
    suffix = "ForTokenClassification"
    options_class = Options

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one text, or one list of words."""
        if options.is_split_into_words and isinstance(inputs, list | tuple):
            return all(isinstance(word, str) for word in inputs)
        return isinstance(inputs, str)

    def preprocess(self, item: Any, options: Options) -> Sequence[TextWindow]:
        """Cut a text into windows, mostly one."""
        longest = self.longest
        if options.stride is not None and not 0 <= options.stride < longest:
            raise InputError(
                f"stride={options.stride} has to be at least 0 and less than a window, of "
                f"{longest} tokens"
            )
        text, starts = _joined(item, options)
        encoded = self.tokenizer(
            item if starts else text,
            is_split_into_words=bool(starts),
            truncation=True,
            max_length=longest,
            return_overflowing_tokens=True,
            stride=options.stride or 0,
        )
        rows = encoded.encodings or []
        if not rows or not rows[0].ids:
            raise InputError("the text is empty, and there is nothing to classify")
        parts = []
        for row in rows:
            columns = zip(row.sequence_ids, row.word_ids, row.offsets, strict=True)
            places = [
                None if sequence is None else _moved(offset, starts[word or 0] if starts else 0)
                for sequence, word, offset in columns
            ]
            parts.append(TextWindow(text, row.ids, places))
        if options.stride is None and len(parts) > 1:
            warnings.warn(
                f"the text is longer than {longest} tokens and only these are classified; pass "
                "stride=… and an aggregation_strategy to read all of it in windows",
                stacklevel=2,
            )
            return parts[:1]
        return parts

    def forward(self, parts: list[TextWindow], options: Options) -> list[Tensor]:
        """Return the probabilities (T, num_labels) of each window."""
        output, lengths = self.run([part.ids for part in parts], use_cache=False)
        return [
            torch.softmax(checked_scores(row), dim=-1) for row in unpadded(output.logits, lengths)
        ]

    def postprocess(
        self, parts: Sequence[TextWindow], outputs: list[Tensor], options: Options
    ) -> list[dict[str, Any]]:
        """Join tokens to entities, without the labels to ignore."""
        found = []
        for part, scores in zip(parts, outputs, strict=True):
            tokens = list(self._tokens(part, scores))
            if options.strategy in ("none", "simple"):
                entities = [self._entity((token,), token.scores) for token in tokens]
            else:
                entities = [self._word(word, options.strategy) for word in _words(tokens)]
            if options.strategy == "none":
                found += [_as_token(one) for one in entities]
            else:
                found += [self._as_group(group) for group in _groups(entities)]
        key = "entity" if options.strategy == "none" else "entity_group"
        found = [one for one in found if one[key] not in options.ignore_labels]
        return _without_overlaps(found) if len(parts) > 1 else found

    def _tokens(self, part: TextWindow, scores: Tensor) -> Iterator[Token]:
        text = part.text
        for index, (token, place) in enumerate(zip(part.ids, part.places, strict=True)):
            if place is None:
                continue
            start, end = place
            # A byte-level token does not say whether it begins a word: no space before it does.
            continues = start > 0 and " " not in text[start - 1 : start + 1]
            word = str(self.tokenizer.convert_ids_to_tokens(token))
            yield Token(word, start, end, index, continues, scores[index])

    def _entity(self, tokens: tuple[Token, ...], scores: Tensor) -> Entity:
        best = int(scores.argmax())
        return Entity((self.model.config.id2label or {})[best], float(scores[best]), tokens)

    def _word(self, tokens: tuple[Token, ...], strategy: str) -> Entity:
        if strategy == "first":
            scores = tokens[0].scores
        elif strategy == "max":
            scores = max((token.scores for token in tokens), key=lambda one: float(one.max()))
        else:
            scores = torch.stack([token.scores for token in tokens]).mean(dim=0)
        return self._entity(tokens, scores)

    def _as_group(self, entities: list[Entity]) -> dict[str, Any]:
        tokens = [token for one in entities for token in one.tokens]
        return {
            "entity_group": entities[0].label.split("-", 1)[-1],
            "score": sum(one.score for one in entities) / len(entities),
            "word": self.tokenizer.convert_tokens_to_string([token.word for token in tokens]),
            "start": tokens[0].start,
            "end": tokens[-1].end,
        }


def _joined(item: Any, options: Options) -> tuple[str, list[int]]:
    """Return a text, and where its words start if that is how it was given."""
    if not options.is_split_into_words:
        if isinstance(item, str):
            return item, []
        raise InputError(
            f"a {type(item).__name__} is no text; give a string, or with "
            "is_split_into_words=True a list of words"
        )
    if not isinstance(item, list | tuple) or not all(isinstance(word, str) for word in item):
        raise InputError(f"with is_split_into_words=True an input is a list of words, not {item!r}")
    starts, at = [], 0
    for word in item:
        starts.append(at)
        at += len(word) + len(options.delimiter)
    return options.delimiter.join(item), starts


def _moved(offset: tuple[int, int], distance: int) -> tuple[int, int]:
    return offset[0] + distance, offset[1] + distance


def _words(tokens: list[Token]) -> Iterator[tuple[Token, ...]]:
    word: list[Token] = []
    for token in tokens:
        if word and not token.continues:
            yield tuple(word)
            word = []
        word.append(token)
    if word:
        yield tuple(word)


def _groups(entities: list[Entity]) -> Iterator[list[Entity]]:
    """Put neighbours of one tag together; "B-" begins anew."""
    group: list[Entity] = []
    for one in entities:
        if group and (one.tag != group[-1].tag or one.label.startswith("B-")):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _as_token(entity: Entity) -> dict[str, Any]:
    (token,) = entity.tokens
    return {
        "entity": entity.label,
        "score": entity.score,
        "index": token.index,
        "word": token.word,
        "start": token.start,
        "end": token.end,
    }


def _without_overlaps(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the longest of the windows' spans at one place, the surest of the longest."""
    chosen: list[dict[str, Any]] = []
    for one in sorted(found, key=lambda one: one["start"]):
        if not chosen or one["start"] >= chosen[-1]["end"]:
            chosen.append(one)
        elif _weight(one) > _weight(chosen[-1]):
            chosen[-1] = one
    return chosen


def _weight(one: dict[str, Any]) -> tuple[int, float]:
    return one["end"] - one["start"], one["score"]
