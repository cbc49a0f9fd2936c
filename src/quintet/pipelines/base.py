"""The base of pipelines: batches inputs and answers in their order."""

import dataclasses
import difflib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from quintet.configuration.constraints import check
from quintet.errors import ConfigError, ContextLengthError, InputError, shown

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel
    from quintet.tokenization import PreTrainedTokenizer


@dataclass(frozen=True, slots=True)
class Rows:
    """A padded batch: ids and mask (B, T), and the number of tokens of each row."""

    input_ids: Tensor
    attention_mask: Tensor
    lengths: list[int]


@dataclass(slots=True)
class _Job:
    """One input, its parts, and their outputs so far."""

    parts: Sequence[Any]
    outputs: list[Any] = field(default_factory=list)


class Pipeline(ABC):
    """A model and its tokenizer for a task.

    An input is cut into parts (`preprocess`; mostly one), parts of several inputs run together
    (`forward`), and the outputs of an input's parts become its result (`postprocess`).

    Args:
        model: of a class that fits the task.
        tokenizer: the model's.
        batch_size: how many parts run at once, where a call does not say.
        **options: what holds for every call, unless the call says otherwise.
    """

    task: ClassVar[str]
    options_class: ClassVar[type[Any]]
    # The class of a model that fits, by how it ends.
    suffix: ClassVar[str]

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizer",
        *,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        if not type(model).__name__.endswith(self.suffix):
            raise InputError(
                f"{type(model).__name__} does not fit {self.task!r}, which needs a model "
                f"…{self.suffix}; load it with AutoModel{self.suffix.removeprefix('Model')}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = _checked_size(batch_size)
        self.options = self.with_options(self.options_class(), options)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """Answer one input, a list, or a stream.

        Args:
            inputs: one input; a list or tuple; or anything else that can be gone through (a
                generator, a dataset), which is read as its results are taken.
            batch_size: how many run at once.
            **options: the task's.

        Returns:
            A result, a list of them, or for a stream an iterator of them.

        Raises:
            InputError: an input or an option that the task does not have.
        """
        chosen = self.with_options(self.options, options)
        size = self.batch_size if batch_size is None else _checked_size(batch_size)
        if self.is_single(inputs, chosen):
            return next(self._results([inputs], chosen, 1))
        if isinstance(inputs, list | tuple):
            if not inputs:
                raise InputError(f"there is nothing to do: {self.task} got an empty list")
            return list(self._results(inputs, chosen, size))
        return self._results(_stream(inputs, self.task), chosen, size)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write model and tokenizer into a directory.

        Raises:
            SaveError: it could not be written.
        """
        self.model.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    # -- what a task says -----------------------------------------------------------------------

    def with_options(self, base: Any, given: Mapping[str, Any]) -> Any:
        """Return the options with replacements."""
        return replaced(base, given, self.task)

    @abstractmethod
    def is_single(self, inputs: Any, options: Any) -> bool:
        """Return whether this is one input."""

    @abstractmethod
    def preprocess(self, item: Any, options: Any) -> Sequence[Any]:
        """Split one input into parts."""

    @abstractmethod
    def forward(self, parts: list[Any], options: Any) -> list[Any]:
        """Run the model over some parts; return an output each."""

    @abstractmethod
    def postprocess(self, parts: Sequence[Any], outputs: list[Any], options: Any) -> Any:
        """Combine the outputs of an input's parts."""

    # -- what tasks share -----------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """The maximum number of tokens for model and tokenizer."""
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    def check_length(self, tokens: int, remedy: str) -> None:
        """Refuse more tokens than the model has positions."""
        room = self.model.config.max_position_embeddings
        if tokens > room:
            raise ContextLengthError(
                f"the text has {tokens} tokens and the model's context is {room} "
                f"(max_position_embeddings); {remedy}"
            )

    def rows(self, ids: Sequence[Sequence[int]], *, side: str = "right") -> Rows:
        """Pad rows of ids on the model's device."""
        pad = self.model.config.pad_token_id
        if pad is None:
            pad = self.tokenizer.pad_token_id or 0
        lengths = [len(row) for row in ids]
        longest = max(lengths)

        def padded(row: Sequence[int], fill: int) -> list[int]:
            room = [fill] * (longest - len(row))
            return [*room, *row] if side == "left" else [*row, *room]

        return Rows(
            torch.tensor([padded(row, pad) for row in ids], device=self.device, dtype=torch.long),
            torch.tensor(
                [padded([1] * n, 0) for n in lengths], device=self.device, dtype=torch.long
            ),
            lengths,
        )

    def run(self, ids: Sequence[Sequence[int]], **inputs: Any) -> tuple[Any, list[int]]:
        """Run the model over padded rows; return output and lengths."""
        rows = self.rows(ids)
        with torch.no_grad():
            output = self.model(
                input_ids=rows.input_ids, attention_mask=rows.attention_mask, **inputs
            )
        return output, rows.lengths

    def _results(self, items: Iterable[Any], options: Any, size: int) -> Iterator[Any]:
        jobs: deque[_Job] = deque()
        waiting: deque[tuple[_Job, Any]] = deque()

        def finished(least: int) -> Iterator[Any]:
            while len(waiting) >= least:
                batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                outputs = self.forward([part for _, part in batch], options)
                for (job, _), output in zip(batch, outputs, strict=True):
                    job.outputs.append(output)
                while jobs and len(jobs[0].outputs) == len(jobs[0].parts):
                    done = jobs.popleft()
                    yield self.postprocess(done.parts, done.outputs, options)

        for item in items:
            job = _Job(self.preprocess(item, options))
            jobs.append(job)
            waiting.extend((job, part) for part in job.parts)
            yield from finished(size)
        yield from finished(1)


def replaced(base: Any, given: Mapping[str, Any], owner: str) -> Any:
    """Return options (a dataclass) with replacements.

    None stands for the default where an option cannot be None.

    Raises:
        InputError: there is no such option, or it is of another type.
    """
    known = [f.name for f in dataclasses.fields(base)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{owner} has no option {name!r}; {hint}")
    kinds, usual = get_type_hints(type(base), include_extras=True), type(base)()
    values = dict(given)
    for name, value in given.items():
        try:
            check(owner, name, value, kinds[name])
        except ConfigError as error:
            if value is not None:
                raise InputError(str(error)) from None
            values[name] = getattr(usual, name)
    return dataclasses.replace(base, **values)


def checked_scores(scores: Tensor) -> Tensor:
    """Return the logits that a result is made of.

    Raises:
        InputError: they are no numbers, and so would be the result.
    """
    if not bool(scores.isfinite().all()):
        raise InputError(
            "the model's scores hold NaN or infinity; check its weights and dtype (float16 "
            "overflows where bfloat16 does not)"
        )
    return scores


def unpadded(values: Tensor, lengths: list[int]) -> list[Tensor]:
    """Return each row of values (B, T, …) as (T, …), without padding."""
    return [row[:length].float().cpu() for row, length in zip(values, lengths, strict=True)]


def _checked_size(size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"batch_size={shown(size)} has to be an integer of at least 1")
    return size


def _stream(inputs: Any, task: str) -> Iterable[Any]:
    """Return an iterable over inputs, also for datasets with only length and indices."""
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes | Mapping):
        return inputs
    if isinstance(inputs, torch.utils.data.Dataset) and hasattr(inputs, "__len__"):
        return (inputs[place] for place in range(len(inputs)))
    raise InputError(
        f"{task} cannot take a {type(inputs).__name__} as input; give one input, a list of them, "
        "or something to go through, such as a generator or a dataset"
    )
