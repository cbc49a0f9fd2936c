"""Distillation from a teacher."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quintet.errors import ConfigError, InputError
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.scoring import AT_ONCE, ScoredHead
from quintet.ops.labels import IGNORED
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.objectives.compared import Running, run_local
from quintet.training.objectives.states import States, language_model, states_of
from quintet.training.objectives.targets import counted, targets
from quintet.training.progress import Progress


class Distillation:
    """Predict the teacher's distribution, and the next token.

    With logits z of the model and t of the teacher where each of N labels x_n is predicted, and
    q = softmax(t/τ), p = softmax(z/τ), what is minimised is

        α · τ²/N Σ_n Σ_v q_v · (log q_v - log p_v) + (1 - α) · 1/N Σ_n -log softmax(z)_{x_n}

    (arXiv:1503.02531, §2: τ² keeps gradients as large as they are without a temperature).

    Args:
        teacher: a model of the same ids, which is left as it is.
        temperature: τ.
        share: α, how much of what is minimised the teacher is.
        running: what the teacher is run by.

    Raises:
        ConfigError: a number breaks its rule.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        temperature: float = 1.0,
        share: float = 1.0,
        *,
        running: Running = run_local,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature} has to be more than 0")
        if not 0 < share <= 1:
            raise ConfigError(f"share={share} of the teacher has to be more than 0 and at most 1")
        self.teacher, self.temperature, self.share = teacher, temperature, share
        self.running = running
        # The states that the teacher made of parts of a step, by their identity.
        self._theirs: dict[int, States] = {}

    def of_step(
        self,
        model: PreTrainedModel,
        parts: Sequence[Batch],
        at: Progress,
        summed: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> "Distillation":
        """Return this with the teacher's states of all parts, where its layers are spread.

        The processes that have them are at different parts as soon as the model learns.
        """
        if language_model(self.teacher).stage is None:
            return self
        own = copy.copy(self)
        own._theirs = {id(part): self._states(part) for part in parts}
        return own

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of labels that count."""
        names = ("distillation",) if self.share == 1 else ("distillation", "next_token")
        return dict.fromkeys(names, counted(targets(batch)))

    def terms(self, model: PreTrainedModel, batch: Batch, at: Progress) -> Mapping[str, Term]:
        """Run both models over a part of a step, and return the terms by their names.

        Raises:
            InputError: a model has no language-modelling head, or the two have other ids.
        """
        student, teacher = language_model(model), language_model(self.teacher)
        sizes = [one.config.vocab_size for one in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the model has {sizes[0]} ids and the teacher {sizes[1]}; a teacher has to have "
                "the tokenizer of the model"
            )
        labels = targets(batch)
        if not student.ends_here:
            # What another process predicts is among its terms.
            states_of(student, batch)
            return {}
        found = self._theirs.get(id(batch)) or self._states(batch)
        states = states_of(student, batch)
        theirs = found.hidden if found.chunks is not None else states.own(found.hidden)
        if theirs.shape[:-1] != states.hidden.shape[:-1]:
            raise InputError(
                f"processes share rows of {batch.input_ids.shape[1]} tokens, which the teacher "
                "cannot cut as the model does; make [data] context larger"
            )
        head, count = student.scored_head(), counted(labels)
        own = states.own(labels, IGNORED)
        wanted = own != IGNORED
        apart = divergence(
            (head, states.hidden[wanted]),
            (teacher.scored_head(), theirs[wanted]),
            self.temperature,
            max(1, AT_ONCE // sizes[0]),
        )
        terms = {"distillation": Term(apart, count, self.share)}
        if self.share < 1:
            total = -head.sums(states.hidden, own).log_prob.sum()
            terms["next_token"] = Term(total, count, 1 - self.share)
        return terms

    @torch.no_grad()
    def _states(self, batch: Batch) -> States:
        teacher = language_model(self.teacher)
        return self.running(lambda: states_of(teacher, batch))


def divergence(
    student: tuple[ScoredHead, Tensor],
    teacher: tuple[ScoredHead, Tensor],
    temperature: float,
    size: int,
) -> Tensor:
    """Return τ² Σ_n KL(q_n ‖ p_n), from heads and the states (N, C) of both.

    Logits are there for `size` tokens at a time, and made again on the way back.
    """

    def part(own: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            t = teacher[0].logits(theirs).to(torch.float32) / temperature
            log_q = t.log_softmax(dim=-1)
        log_p = (student[0].logits(own).to(torch.float32) / temperature).log_softmax(dim=-1)
        return torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)

    total = student[1].sum() * 0.0
    for own, theirs in zip(
        torch.split(student[1], size), torch.split(teacher[1], size), strict=True
    ):
        total = total + checkpoint(part, own, theirs, use_reentrant=False)
    return total * temperature**2
