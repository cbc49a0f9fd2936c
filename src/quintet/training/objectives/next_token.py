"""The next token of texts, and with prediction layers those after it."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from quintet.errors import ConfigError
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.scoring import ScoredHead
from quintet.ops.labels import IGNORED
from quintet.training.balance import BalanceLoss, loads_of_step, routing_of
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.objectives.states import States, language_model, routers_run, states_of
from quintet.training.objectives.targets import counted, targets
from quintet.training.progress import Progress
from quintet.training.schedule import Constant, Schedule


class LanguageModelling:
    """Predict the next token of texts.

    With N labels x_n that count, logits z_n (V,) where each is predicted and lse = log Σ_v exp z_v,
    what is minimised is

        (1 - ε) · 1/N Σ_n -log p(x_n)
        + ε · 1/N Σ_n 1/V Σ_v -log p(v)           label smoothing
        + ζ · 1/N Σ_n lse_n²                      z-loss (arXiv:2204.02311, §5)
        + λ/D · Σ_k 1/N_k Σ_n -log p_k(x_n)       what the k-th of D prediction layers predicts
                                                  (arXiv:2412.19437, eq. 24-25)
        + what the balance losses are.

    The terms are `next_token`, and as far as they are asked for `smoothing`, `z_loss`,
    `prediction_1` to `prediction_D` and those of the balance losses. Tokens of one text are never
    compared with what another text's tokens predict, and padding with nothing.

    The losses that a model's own config adds where it is called with labels are not added here.

    Args:
        z_loss: ζ, which keeps the logits from drifting away together; 1e-4 in its paper.
        label_smoothing: ε, the share of a target that is spread over all ids.
        prediction: λ; None to leave prediction layers alone. Where a schedule is 0 they do not run,
            cost nothing and stay as they are.
        balance: losses of unbalanced experts.
        depth: D, how many prediction layers the model has.

    Raises:
        ConfigError: a number breaks its rule.
    """

    def __init__(
        self,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        prediction: Schedule | float | None = None,
        balance: Sequence[BalanceLoss] = (),
        depth: int = 1,
    ) -> None:
        if not z_loss >= 0:
            raise ConfigError(f"z_loss={z_loss} is the weight of a loss; it is at least 0")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing={label_smoothing} is a share; it is at least 0 and less than 1"
            )
        if isinstance(prediction, int | float):
            if not prediction >= 0:
                raise ConfigError(f"prediction={prediction} weighs a loss; it is at least 0")
            prediction = Constant(prediction)
        if depth < 1:
            raise ConfigError(f"depth={depth} counts prediction layers; it is at least 1")
        self.z_loss, self.label_smoothing = z_loss, label_smoothing
        self.prediction, self.balance = prediction, tuple(balance)
        self.depth = 0 if prediction is None else depth
        self._loads: Tensor | None = None

    def of_step(
        self,
        model: PreTrainedModel,
        parts: Sequence[Batch],
        at: Progress,
        summed: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> "LanguageModelling":
        """Return this with the loads of all parts of a step, if a balance loss needs these."""
        if not any(loss.of_whole_step for loss in self.balance):
            return self
        text_model = language_model(model)
        own = copy.copy(self)
        loads = loads_of_step(
            text_model, parts, lambda part: states_of(text_model, part, depth=self._depth(at))
        )
        own._loads = summed(loads)
        return own

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of labels of each term, and the counts of the balance losses."""
        labels = counted(targets(batch))
        counts = {"next_token": labels}
        if self.label_smoothing:
            counts["smoothing"] = labels
        if self.z_loss:
            counts["z_loss"] = labels
        for k in range(1, self.depth + 1):
            counts[f"prediction_{k}"] = counted(targets(batch, k + 1))
        for loss in self.balance:
            counts |= loss.counts(batch)
        return counts

    def terms(self, model: PreTrainedModel, batch: Batch, at: Progress) -> Mapping[str, Term]:
        """Run the model over a part of a step, and return the terms by their names.

        Raises:
            InputError: the model has no language-modelling head, not that many prediction layers
                or no experts to balance; or a label is no id.
        """
        text_model = language_model(model)
        depth = self._depth(at)
        states = states_of(text_model, batch, routed=bool(self.balance), depth=depth)
        head = text_model.scored_head()
        # What another process predicts is among its terms.
        terms = self._of_next_token(head, states, targets(batch)) if text_model.ends_here else {}
        for k, ahead in enumerate(states.ahead, start=1):
            assert self.prediction is not None
            labels = targets(batch, k + 1)
            total = -head.sums(ahead, states.own(labels, IGNORED)).log_prob.sum()
            weight = self.prediction.at(at) / self.depth
            terms[f"prediction_{k}"] = Term(total, counted(labels), weight)
        # A stage may have no layer with experts.
        if self.balance and (states.router_logits or text_model.stage is None):
            routing = routing_of(
                text_model,
                states.router_logits,
                batch,
                self._loads,
                states.chunks,
                None if text_model.stage is None else routers_run(text_model, depth),
            )
            for loss in self.balance:
                terms |= loss.terms(routing, at)
        return terms

    def _depth(self, at: Progress) -> int:
        """Return the number of prediction layers that run: none if λ is 0."""
        return self.depth if self.prediction is not None and self.prediction.at(at) else 0

    def _of_next_token(self, head: ScoredHead, states: States, labels: Tensor) -> dict[str, Term]:
        share, count = self.label_smoothing, counted(labels)
        sums = head.sums(states.hidden, states.own(labels, IGNORED), mean=share > 0)
        terms = {"next_token": Term(-sums.log_prob.sum(), count, 1 - share)}
        if sums.mean is not None:
            terms["smoothing"] = Term((sums.log_sum - sums.mean).sum(), count, share)
        if self.z_loss:
            terms["z_loss"] = Term(sums.log_sum.square().sum(), count, self.z_loss)
        return terms
