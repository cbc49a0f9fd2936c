"""Records of a training, and the interface of their readers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from quintet.modeling.base import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Facts known before the first step.

    Attributes:
        folder: where the run is written.
        model: what is trained, as it begins.
        step: how many steps were taken before; more than none where a run goes on.
        steps: how many steps there will be in all, where that is known.
        tokens: how many tokens will be read in all, where that is known.
        minutes: how many minutes there will be in all, where that is the budget.
        step_tokens: how many tokens a step reads at first.
        parts: in how many parts a step is cut.
        context: how many tokens a row has at first.
        documents: how many documents, conversations or pairs there are, where that is known.
        data_tokens: how many tokens these are, where that is known.
        optimizer_bytes: what the optimisers keep, with masters, in bytes.
        settings: the configuration, in what JSON has.
    """

    folder: Path
    model: PreTrainedModel
    step: int = 0
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    step_tokens: int = 0
    parts: int = 1
    context: int = 0
    documents: int | None = None
    data_tokens: int | None = None
    optimizer_bytes: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of the optimiser, or one that was left out.

    Attributes:
        step: how many steps have been taken, this one included.
        tokens: how many tokens have been read, these included.
        done: the share of the whole training that is done, 0 to 1.
        step_tokens: how many tokens this step read.
        context: how many tokens a row had.
        seconds: how long it took.
        elapsed: how long all steps together have taken, those before a resumption included.
        loss: what was minimised: Σ weight · mean over the terms.
        terms: the mean of each term, without its weight.
        learning_rates: by group of parameters.
        grad_norm: of all gradients together, before clipping.
        balance: the violation of balance, max load / mean load - 1, by the name of its router.
        skipped: why nothing was learned from it, or None.
    """

    step: int
    tokens: int
    done: float
    step_tokens: int
    context: int
    seconds: float
    elapsed: float = 0.0
    loss: float
    terms: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    balance: Mapping[str, float] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second of this step."""
        return self.step_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        step: how many steps had been taken.
        tokens: how many tokens had been read.
        seconds: how long it took.
        scored: how many tokens were predicted.
        bits_per_token: the mean of -log2 p of these.
        bits_per_byte: the sum of -log2 p over the bytes of the texts; None if only parts of
            texts are scored, as of conversations.
        agreement: how often the prediction layer names the model's own choice of the token after
            the next; None without one.
        balance: the violation of balance over the texts, by the name of its router.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scored: int = 0
    bits_per_token: float = 0.0
    bits_per_byte: float | None = None
    agreement: float | None = None
    balance: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """2 to the bits of a token; infinite where that is out of range."""
        return 2.0**self.bits_per_token if self.bits_per_token < 1024 else float("inf")

    @property
    def score(self) -> float:
        """The measure of the best step: bits per byte, or per token where there are no bytes."""
        return self.bits_per_token if self.bits_per_byte is None else self.bits_per_byte


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSample:
    """A text sampled during training."""

    step: int
    tokens: int
    prompt: str
    text: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that lies on the disk, whole."""

    step: int
    path: Path
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a training.

    Attributes:
        reason: "done", "interrupted" by a signal, or "failed".
        step: how many steps were taken in all.
        tokens: how many tokens were read in all.
        seconds: how long it took in all, earlier parts of a run included.
        path: the last good checkpoint, or None.
    """

    reason: Literal["done", "interrupted", "failed"]
    step: int
    tokens: int
    seconds: float
    path: Path | None = None


class Reporter(Protocol):
    """Interface for readers of a training's records, called in order from one thread."""

    def started(self, beginning: Beginning) -> None:
        """Report the beginning of a run."""
        ...

    def step(self, record: StepRecord) -> None:
        """Report a step."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """Report an evaluation."""
        ...

    def sampled(self, sample: GeneratedSample) -> None:
        """Report a text that the model wrote."""
        ...

    def saved(self, saved: Saved) -> None:
        """Report a checkpoint."""
        ...

    def warned(self, message: str) -> None:
        """Report a fault that does not end the training."""
        ...

    def ended(self, end: End) -> None:
        """Report the end."""
        ...


class Silent:
    """A reporter that does nothing."""

    def started(self, beginning: Beginning) -> None:
        """Do nothing."""

    def step(self, record: StepRecord) -> None:
        """Do nothing."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Do nothing."""

    def sampled(self, sample: GeneratedSample) -> None:
        """Do nothing."""

    def saved(self, saved: Saved) -> None:
        """Do nothing."""

    def warned(self, message: str) -> None:
        """Do nothing."""

    def ended(self, end: End) -> None:
        """Do nothing."""


class Reporters:
    """Tells several reporters, in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def started(self, beginning: Beginning) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.started(beginning)

    def step(self, record: StepRecord) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.step(record)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.evaluated(evaluation)

    def sampled(self, sample: GeneratedSample) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.sampled(sample)

    def saved(self, saved: Saved) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.saved(saved)

    def warned(self, message: str) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.warned(message)

    def ended(self, end: End) -> None:
        """Pass it to all of them."""
        for reporter in self.reporters:
            reporter.ended(end)
