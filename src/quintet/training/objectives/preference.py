"""The preferred one of two answers: direct preference optimisation."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import ConfigError, InputError, shown
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.heads import CausalLMHead
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.objectives.compared import Running, run_local
from quintet.training.objectives.states import language_model, log_probs_of_rows, states_of
from quintet.training.objectives.targets import targets
from quintet.training.progress import Progress

PreferenceLoss = Literal["sigmoid", "ipo"]


class Preference:
    """Prefer the answers of the first half of a batch to those of the second.

    With the log-probabilities of a preferred answer w and another one l to the same question x, to
    the model π and to a reference,

        Δ = log π(w|x) - log ref(w|x) - (log π(l|x) - log ref(l|x)),

    what is minimised is the mean over pairs of

        -(1 - ε) · log σ(β Δ) - ε · log σ(-β Δ)     "sigmoid": DPO (arXiv:2305.18290, eq. 7), with
                                                    label smoothing cDPO
        (Δ - 1/(2β))²                               "ipo" (arXiv:2310.12036, eq. 17), where the
                                                    log-probabilities are means over the tokens of
                                                    an answer, so that long ones do not decide.

    Terms that are told and not minimised: `reward_margin`, β Δ, and `reward_accuracy`, the share of
    pairs with Δ > 0.

    Args:
        beta: β, how much it costs to go away from the reference.
        loss: "sigmoid" or "ipo".
        label_smoothing: ε, how often the preferences are taken to be the wrong way round.
        reference: the model that answers are compared with, which is left as it is; None for the
            model itself without its adapters.
        reference_adapter: an adapter on the model, with which alone it is the reference.
        reference_free: compare with a model to which all answers are alike.
        running: what the reference is run by.

    Raises:
        ConfigError: a value breaks its rule, or contradicts another.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        loss: PreferenceLoss = "sigmoid",
        label_smoothing: float = 0.0,
        reference: PreTrainedModel | None = None,
        reference_adapter: str | None = None,
        reference_free: bool = False,
        running: Running = run_local,
    ) -> None:
        if not beta > 0:
            raise ConfigError(f"beta={beta} has to be more than 0")
        if loss not in get_args(PreferenceLoss):
            known = ", ".join(map(repr, get_args(PreferenceLoss)))
            raise ConfigError(f"loss={shown(loss)} is none of {known}")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing={label_smoothing} is how often preferences are the wrong way "
                "round; it is at least 0 and less than 0.5"
            )
        if label_smoothing and loss != "sigmoid":
            raise ConfigError(f"label_smoothing is of loss='sigmoid', and not of {loss!r}")
        if reference is not None and reference_free:
            raise ConfigError("reference_free=True compares with no model; leave reference out")
        if reference_adapter is not None and (reference is not None or reference_free):
            raise ConfigError(
                f"reference_adapter={shown(reference_adapter)} makes the model its own reference; "
                "leave reference and reference_free out"
            )
        self.beta, self.loss, self.label_smoothing = beta, loss, label_smoothing
        self.reference, self.reference_free = reference, reference_free
        self.reference_adapter = reference_adapter
        self.running = running
        # What the reference made of parts of a step, by their identity.
        self._before: dict[int, Tensor | None] = {}

    def of_step(
        self,
        model: PreTrainedModel,
        parts: Sequence[Batch],
        at: Progress,
        summed: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> "Preference":
        """Return a copy with the reference's results for all parts, if its layers are spread.

        The processes that have them are at different parts as soon as the model learns.
        """
        text_model = language_model(model)
        compared = text_model if self.reference is None else language_model(self.reference)
        if self.reference_free or compared.stage is None:
            return self
        own = copy.copy(self)
        own._before = {id(x): self._reference(text_model, x, targets(x)) for x in parts}
        return own

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of pairs.

        Raises:
            InputError: one row has no other.
        """
        rows = len(batch.input_ids)
        if rows % 2:
            raise InputError(
                f"{rows} rows are no pairs; the preferred answers are the first half of a batch, "
                "and the others, in the same order, the second"
            )
        return dict.fromkeys(("preference", "reward_margin", "reward_accuracy"), rows // 2)

    def terms(self, model: PreTrainedModel, batch: Batch, at: Progress) -> Mapping[str, Term]:
        """Run the model over a part of a step, and return the terms by their names.

        Raises:
            InputError: there is no reference, one row has no other, or rows hold several texts.
        """
        pairs = self.counts(batch)["preference"]
        if batch.seq_idx is not None and bool((batch.seq_idx.diff(dim=1) != 0).any()):
            raise InputError("an answer is a row of its own; pairs are not packed (seq_idx)")
        text_model, labels = language_model(model), targets(batch)
        if not text_model.ends_here:
            # What another process predicts is among its terms.
            states_of(text_model, batch)
            return {}
        before = self._before.get(id(batch))
        if before is None:
            before = self._reference(text_model, batch, labels)
        assert before is not None
        ratios = log_probs_of_rows(text_model, batch, labels) - before
        if self.loss == "ipo":
            ratios = ratios / (labels >= 0).sum(dim=1).clamp(min=1)
        preferred, other = ratios.chunk(2)
        apart = preferred - other
        margin = self.beta * apart
        if self.loss == "ipo":
            losses = (apart - 1 / (2 * self.beta)).square()
        else:
            share = self.label_smoothing
            losses = -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)
        detached = margin.detach()
        accuracy = (detached > 0).sum().to(detached.dtype)
        terms = {
            "preference": Term(losses.sum(), pairs),
            "reward_margin": Term(detached.sum(), pairs, 0.0),
            "reward_accuracy": Term(accuracy, pairs, 0.0),
        }
        if (sequences := text_model.sequences) is None:
            return terms
        # What processes that share rows find is added up, and each has found all of this.
        return {name: replace(one, sum=sequences.once(one.sum)) for name, one in terms.items()}

    @torch.no_grad()
    def _reference(self, model: CausalLMHead, batch: Batch, labels: Tensor) -> Tensor | None:
        """Return the log-probabilities that the model's are compared with, (B,); None elsewhere."""
        if self.reference_free:
            return torch.zeros(len(labels), device=labels.device, dtype=torch.float32)
        if self.reference is not None:
            reference = language_model(self.reference)
            return self.running(lambda: _log_probs(reference, batch, labels))
        with _as_reference(model, self.reference_adapter):
            return _log_probs(model, batch, labels)


def _log_probs(model: CausalLMHead, batch: Batch, labels: Tensor) -> Tensor | None:
    """Return log p of each row, (B,); None if another process has the last layer."""
    if model.ends_here:
        return log_probs_of_rows(model, batch, labels)
    states_of(model, batch)
    return None


@contextmanager
def _as_reference(model: CausalLMHead, name: str | None) -> Iterator[None]:
    """Switch off a model's adapters, or all but one, and the random choices of training."""
    adapters = model.adapters
    if adapters is None or not adapters.active:
        raise InputError(
            "answers are compared with a reference, which is the model without its adapters, and "
            "it has none in use; give reference=, a copy of the model as it is now, or "
            "reference_free=True"
        )
    modes = {module: module.training for module in model.modules()}
    active = adapters.active
    if name is None:
        model.disable_adapters()
    else:
        model.set_adapter(name)
    model.eval()
    try:
        yield
    finally:
        if name is None:
            model.enable_adapters()
        else:
            adapters.use(model, active)
        for module, training in modes.items():
            module.training = training
