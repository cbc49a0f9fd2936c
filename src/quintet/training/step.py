"""One step: the sums over its parts, and the optimisers' update."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from quintet.errors import InputError
from quintet.modeling.base import PreTrainedModel
from quintet.training.batch import Batch
from quintet.training.objective import Objective, StepObjective
from quintet.training.optimizers import Optimizers
from quintet.training.optimizers.layout import LOCAL, Layout
from quintet.training.progress import Progress
from quintet.training.ranks import Alone, Ranks

ALONE = Alone()
# Among the sums of terms, of which none is called so.
LOSS = ""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of a step.

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
    ranks: Ranks = ALONE,
    layout: Layout = LOCAL,
) -> StepOutcome:
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
    counts = ranks.counted(own)
    several = len(parts) > 1 or ranks.share[1] > 1 or ranks.degrees.pp > 1
    if several and isinstance(objective, StepObjective):
        with computing():
            looking = partial(objective.of_step, model, parts, at, ranks.summed)
            objective = layout.run(looking)
    if not any(counts.values()):
        return StepOutcome(math.nan, skipped="no label of it counts")
    logged: list[tuple[str, Tensor]] = []

    def learned(batch: Batch) -> Tensor | None:
        with computing():
            whole, means = layout.run(partial(_part, model, objective, batch, at, counts))
        reported = means if whole is None else {LOSS: whole, **means}
        logged.extend((name, mean.detach()) for name, mean in reported.items())
        return whole

    # Though it may not be finite: other processes wait for what passes backward.
    sizes = [_size(model, batch) for batch in parts]
    layout.learn([partial(learned, batch) for batch in parts], sizes)
    # Of several processes, not all find the same terms.
    sums = dict.fromkeys((LOSS, *counts), 0.0)
    present = dict.fromkeys(sums, 0.0)
    for name, mean in logged:
        sums[name] += mean.item()
        present[name] = 1.0
    totals = ranks.total({**sums, **{f"{name} there": one for name, one in present.items()}})
    loss = totals[LOSS]
    found = {name: totals[name] for name in counts if totals[f"{name} there"]}
    finite = math.isfinite(loss)
    return StepOutcome(loss, found, skipped=None if finite else "its loss is not finite")


def _size(model: PreTrainedModel, batch: Batch) -> int:
    """Return the number of a batch's tokens, padding included, that this process runs over."""
    sequences = model.sequences
    if sequences is None:
        return batch.input_ids.numel()
    chunks = sequences.chunks(batch.input_ids.shape[1])
    return len(batch.input_ids) * chunks.length // chunks.count


def _part(
    model: PreTrainedModel,
    objective: Objective,
    batch: Batch,
    at: Progress,
    counts: Mapping[str, float],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the contribution of a part of a step to the objective and to each term's mean.

    Where other processes have the terms, it adds nothing here.
    """
    terms = objective.terms(model, batch, at)
    means = {name: term.sum / max(counts[name], 1) for name, term in terms.items()}
    weighed = [terms[name].weight * mean for name, mean in means.items() if terms[name].weight]
    return (sum(weighed[1:], weighed[0]) if weighed else None), means


def take(
    model: PreTrainedModel,
    objective: Objective,
    optimizers: Optimizers,
    parts: Sequence[Batch],
    at: Progress,
    computing: Callable[[], AbstractContextManager[object]],
    ranks: Ranks = ALONE,
) -> StepOutcome:
    """Take a step, or leave it out where its numbers are not finite: then nothing has changed.

    Raises:
        InputError: the batches have ids that the model has no embedding of.
    """
    try:
        layout = optimizers.layout
        found = accumulate(model, objective, parts, at, computing, ranks, layout)
        if found.skipped is not None:
            return found
        norm = optimizers.clip().item()
        if not math.isfinite(norm):
            why = "its gradient is not finite"
            return StepOutcome(found.loss, found.terms, norm, why)
        optimizers.step(at)
        return StepOutcome(found.loss, found.terms, norm)
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
