"""`pipeline("zero-shot-classification")`: labels that are named only now.

Each label makes a hypothesis, and a model of natural language inference says whether the text
entails it (arXiv:1909.00161, §5).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.pipelines.base import Pipeline, checked_scores

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel
    from quintet.tokenization import PreTrainedTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of zero-shot classification.

    Attributes:
        candidate_labels: a list of labels, or one string of them with commas.
        hypothesis_template: how a label becomes a sentence; "{}" stands for the label.
        multi_label: several may be true: each is judged alone, entailment against contradiction.
    """

    candidate_labels: str | Sequence[str] | None = None
    hypothesis_template: str = "This example is {}."
    multi_label: bool = False

    def __post_init__(self) -> None:
        if self.hypothesis_template.format("x") == self.hypothesis_template:
            raise InputError(
                f"hypothesis_template={self.hypothesis_template!r} has no place for the label; "
                "write {} where it goes"
            )

    @property
    def labels(self) -> list[str]:
        """The labels, one by one."""
        given = self.candidate_labels
        if isinstance(given, str):
            given = [label.strip() for label in given.split(",") if label.strip()]
        if not given:
            raise InputError('there are no labels; give candidate_labels=["politics", "sports"]')
        return list(given)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text with one label's hypothesis."""

    text: str
    label: str
    ids: list[int]


class ZeroShotClassificationPipeline(Pipeline):
    """Says how well each of some labels fits a text.

    A result is `{"sequence": …, "labels": […], "scores": […]}`, likeliest first.

    The label that begins with "entail" tells how well one fits; where there is none, the last one,
    with a warning.

    Raises:
        InputError: the model has one label only.
    """

    task = "zero-shot-classification"
    suffix = "ForSequenceClassification"
    options_class = Options

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizer", **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        labels = model.config.label2id or {}
        entails = [i for label, i in labels.items() if label.lower().startswith("entail")]
        if len(labels) < 2:
            raise InputError(
                f"this model has {len(labels)} label; zero-shot-classification needs a model of "
                "natural language inference, with labels for entailment and contradiction"
            )
        if not entails:
            warnings.warn(
                f"the labels of this model are {', '.join(labels)}, none of which is 'entailment'; "
                "the last one is taken for it. config.label2id says otherwise",
                stacklevel=2,
            )
        self.entailment = entails[0] if entails else len(labels) - 1
        # Where there are three, what is not entailed and comes first is the contradiction.
        self.contradiction = len(labels) - 1 if self.entailment == 0 else 0

    def __call__(  # type: ignore[override]  # the name is that of Transformers
        self,
        sequences: Any,
        candidate_labels: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Judge one text, a list, or a stream of them; see `Options`."""
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(sequences, batch_size=batch_size, **options)

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one text."""
        return isinstance(inputs, str)

    def preprocess(self, item: Any, options: Options) -> Sequence[Hypothesis]:
        """Return a part for each label."""
        if not isinstance(item, str) or not item:
            raise InputError(f"{item!r} is no text; give a string that is not empty")
        return [
            Hypothesis(item, label, self._ids(item, options.hypothesis_template.format(label)))
            for label in options.labels
        ]

    def forward(self, parts: list[Hypothesis], options: Options) -> list[Tensor]:
        """Return the logits of each text with its hypothesis."""
        output, _ = self.run([part.ids for part in parts], use_cache=False)
        return list(checked_scores(output.logits.float().cpu()))

    def postprocess(
        self, parts: Sequence[Hypothesis], outputs: list[Tensor], options: Options
    ) -> Any:
        """Compare the labels with each other, or each with its contradiction."""
        logits = torch.stack(outputs)
        if options.multi_label or len(parts) == 1:
            pair = logits[:, [self.contradiction, self.entailment]]
            scores = torch.softmax(pair, dim=-1)[:, 1]
        else:
            scores = torch.softmax(logits[:, self.entailment], dim=0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {
            "sequence": parts[0].text,
            "labels": [parts[i].label for i in order],
            "scores": [scores[i].item() for i in order],
        }

    def _ids(self, text: str, hypothesis: str) -> list[int]:
        # What is cut is the text: without its hypothesis there is no question.
        return self.tokenizer.encode(
            text, hypothesis, truncation="only_first", max_length=self.longest
        )
