"""One step: what its parts add up to, and what the optimisers make of it."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from quintet.errors import InputError
from quintet.modeling.base import PreTrainedModel
from quintet.training.batch import Batch
from quintet.training.crew import Alone, Crew
from quintet.training.objective import Objective, StepObjective
from quintet.training.optimizers import Optimizers
from quintet.training.optimizers.layout import HERE, Layout
from quintet.training.progress import Progress

__all__ = ["Outcome", "accumulate", "take"]

ALONE = Alone()
# Among the sums of terms, of which none is called so.
LOSS = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to.

    Attributes:
        loss: Σ weight · mean over the terms.
        terms: the mean of each term.
        norm: of the whole gradient, before it was clipped.
        skipped: why nothing was learned from it, or None.
    """

    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    skipped: str | None = None


def accumulate(
    model: PreTrainedModel,
    objective: Objective,
    parts: Sequence[Batch],
    at: Progress,
    computing: Callable[[], AbstractContextManager[object]],
    crew: Crew = ALONE,
    layout: Layout = HERE,
) -> Outcome:
    """Add the gradient of a whole step to those there are, part by part.

    With sums s and counts n of parts p, and weights w of terms k, what is minimised is
    Σ_k w_k · (Σ_p s_pk) / (Σ_p n_pk), however the step is cut into parts and these are given to
    processes. Each of those has its share of the gradient here.

    Raises:
        InputError: the batches have ids that the model has no embedding of.
    """
    own: Counter[str] = Counter()
    for batch in parts:
        _check(batch, model.config.vocab_size)
        own.update(objective.counts(batch))
    counts = crew.counted(own)
    if (len(parts) > 1 or crew.share[1] > 1) and isinstance(objective, StepObjective):
        with computing():
            looking = partial(objective.of_step, model, parts, at, crew.summed)
            objective = layout.run(looking)
    if not any(counts.values()):
        return Outcome(math.nan, skipped="no label of it counts")
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in parts:
        with computing():
            whole, means = layout.run(partial(_part, model, objective, batch, at, counts))
        # Though it may not be finite: other processes wait for what passes backward.
        whole.backward()  # type: ignore[no-untyped-call]
        sums[LOSS] += whole.item()
        for name, mean in means.items():
            sums[name] += mean.item()
    found = crew.total(sums)
    loss = found.pop(LOSS)
    finite = math.isfinite(loss)
    return Outcome(loss, found, skipped=None if finite else "its loss is not finite")


def _part(
    model: PreTrainedModel,
    objective: Objective,
    batch: Batch,
    at: Progress,
    counts: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a part of a step adds to what is minimised, and to the mean of each term."""
    terms = objective.terms(model, batch, at)
    means = {name: term.sum / max(counts[name], 1) for name, term in terms.items()}
    weighed = [terms[name].weight * mean for name, mean in means.items() if terms[name].weight]
    return sum(weighed[1:], weighed[0]), means


def take(
    model: PreTrainedModel,
    objective: Objective,
    optimizers: Optimizers,
    parts: Sequence[Batch],
    at: Progress,
    computing: Callable[[], AbstractContextManager[object]],
    crew: Crew = ALONE,
) -> Outcome:
    """Take a step, or leave it out where its numbers are not finite: then nothing has changed.

    Raises:
        InputError: the batches have ids that the model has no embedding of.
    """
    try:
        layout = optimizers.layout
        found = accumulate(model, objective, parts, at, computing, crew, layout)
        if found.skipped is not None:
            return found
        norm = optimizers.clip().item()
        if not math.isfinite(norm):
            why = "its gradient is not finite"
            return Outcome(found.loss, found.terms, norm, why)
        optimizers.step(at)
        return Outcome(found.loss, found.terms, norm)
    finally:
        optimizers.zero_grad()


def _check(batch: Batch, vocabulary: int) -> None:
    """Refuse ids and labels that the model has no row for."""
    for name, ids, least in (("input_ids", batch.input_ids, 0), ("labels", batch.labels, -100)):
        wrong = ids[(ids < least) | (ids >= vocabulary) | ((ids < 0) & (ids != -100))]
        if len(wrong):
            raise InputError(
                f"{name} hold {int(wrong[0])}, and the model has ids from 0 to {vocabulary - 1}"
                + ("; a label that is not learned is -100" if name == "labels" else "")
            )
