"""`pipeline("text-classification")`: which label a text has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.pipelines.base import Pipeline, checked_scores

Function = Literal["sigmoid", "softmax", "none"]
FUNCTIONS = ("sigmoid", "softmax", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of text classification.

    Attributes:
        top_k: how many labels to return, likeliest first, None for all; where it is not given, a
            result is the likeliest label itself.
        function_to_apply: what makes scores of logits: "sigmoid", "softmax" or "none"; where it is
            not given, the kind of problem decides.
        truncation: cut longer texts, as in `tokenizer(...)`.
        max_length: to how many tokens; the model's context if not given.
        add_special_tokens: those the tokenizer puts around a text.
    """

    top_k: int | Literal[""] | None = ""
    function_to_apply: str | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} has to be at least 1, or None for every label")
        if self.function_to_apply is not None and self.function_to_apply.lower() not in FUNCTIONS:
            raise InputError(
                f"function_to_apply={self.function_to_apply!r} has to be one of {FUNCTIONS}"
            )


class TextClassificationPipeline(Pipeline):
    """Labels texts, or pairs of texts given as `{"text": …, "text_pair": …}`.

    A result is `{"label": …, "score": …}`, or with `top_k` a list of them; a single text without
    `top_k` gives a list of one, as it does in Transformers.
    """

    task = "text-classification"
    suffix = "ForSequenceClassification"
    options_class = Options

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """Label one text or pair, a list, or a stream of them; see `Options`."""
        result = super().__call__(inputs, batch_size=batch_size, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in options else result

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one text or one pair."""
        return isinstance(inputs, str | Mapping)

    def preprocess(self, item: Any, options: Options) -> Sequence[list[int]]:
        """Return the ids of a text or of a pair."""
        text, pair = _text_and_pair(item)
        max_length = self.longest if options.max_length is None else options.max_length
        ids = self.tokenizer.encode(
            text,
            pair,
            truncation=options.truncation,
            max_length=max_length if options.truncation else None,
            add_special_tokens=options.add_special_tokens,
        )
        if not ids:
            raise InputError("the text is empty, and there is nothing to classify")
        self.check_length(len(ids), "shorten it, or pass truncation=True")
        return [ids]

    def forward(self, parts: list[list[int]], options: Options) -> list[Tensor]:
        """Return the logits (num_labels,) of each text."""
        output, _ = self.run(parts, use_cache=False)
        return list(checked_scores(output.logits.float().cpu()))

    def postprocess(self, parts: Sequence[Any], outputs: list[Tensor], options: Options) -> Any:
        """Return the likeliest label, or the `top_k` likeliest, with their scores."""
        (logits,) = outputs
        scores = self._scores(logits, options).tolist()
        labels = self.model.config.id2label or {}
        found = [{"label": labels[i], "score": score} for i, score in enumerate(scores)]
        found.sort(key=lambda one: one["score"], reverse=True)
        return found[0] if options.top_k == "" else found[: options.top_k]

    def _scores(self, logits: Tensor, options: Options) -> Tensor:
        name = options.function_to_apply
        if name is None:
            kind = self.model.config.problem_type
            if kind == "regression":
                name = "none"
            elif kind == "multi_label_classification" or self.model.config.num_labels == 1:
                name = "sigmoid"
            else:
                name = "softmax"
        if name.lower() == "sigmoid":
            return torch.sigmoid(logits)
        return torch.softmax(logits, dim=-1) if name.lower() == "softmax" else logits


def _text_and_pair(item: Any) -> tuple[str, str | None]:
    if isinstance(item, str):
        return item, None
    if isinstance(item, Mapping) and set(item) <= {"text", "text_pair"} and "text" in item:
        return item["text"], item.get("text_pair")
    # [[text, pair]] is how pairs were given before there were mappings.
    match item:
        case [[str(text), str(pair)]]:
            return text, pair
    raise InputError(
        f"a {type(item).__name__} is no text; give a string, or a pair of texts as "
        '{"text": …, "text_pair": …}'
    )
