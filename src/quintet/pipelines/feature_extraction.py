"""`pipeline("feature-extraction")`: the vectors a model has for the tokens of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quintet.errors import InputError
from quintet.pipelines.base import Pipeline, unpadded


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of feature extraction.

    Attributes:
        return_tensors: a tensor rather than nested lists.
        truncation: cut longer texts, as in `tokenizer(...)`.
        tokenize_kwargs: further options of `tokenizer(...)`.
    """

    return_tensors: bool = False
    truncation: bool | str | None = None
    tokenize_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.truncation is not None and "truncation" in self.tokenize_kwargs:
            raise InputError("truncation is given twice, also in tokenize_kwargs; give one")


class FeatureExtractionPipeline(Pipeline):
    """Returns the last hidden states of a text, (1, T, C)."""

    task = "feature-extraction"
    suffix = "Model"
    options_class = Options

    def is_single(self, inputs: Any, options: Options) -> bool:
        """Return whether this is one text."""
        return isinstance(inputs, str)

    def preprocess(self, item: Any, options: Options) -> Sequence[list[int]]:
        """Return the ids of a text."""
        if not isinstance(item, str):
            raise InputError(f"a {type(item).__name__} is no text; give a string")
        given: dict[str, Any] = {**options.tokenize_kwargs}
        if options.truncation is not None:
            given["truncation"] = options.truncation
        if given.get("truncation") and given.get("max_length") is None:
            given["max_length"] = self.longest
        ids = self.tokenizer.encode(item, **given)
        if not ids:
            raise InputError("the text is empty, and there is nothing to extract")
        self.check_length(len(ids), "shorten it, or pass truncation=True")
        return [ids]

    def forward(self, parts: list[list[int]], options: Options) -> list[Tensor]:
        """Return the last hidden states (T, C) of each text."""
        output, lengths = self.run(parts, use_cache=False)
        return unpadded(output.last_hidden_state, lengths)

    def postprocess(self, parts: Sequence[Any], outputs: list[Tensor], options: Options) -> Any:
        """Return the one row there is, as a batch of one."""
        features = outputs[0][None]
        return features if options.return_tensors else features.tolist()
