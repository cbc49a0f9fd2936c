"""Qwen2-MoE's losses: of unbalanced experts, and of large router logits."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.ops.routing import sum_by_text
from quintet.training.balance.routing import Routing, texts_of
from quintet.training.balance.weights import weight_schedule
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.progress import Progress
from quintet.training.schedule import Schedule

Scope = Literal["sequence", "micro", "global"]


class SwitchBalance:
    """Spreads tokens over experts, and keeps router logits small.

        auxiliary   α E Σ_e f_e P_e        f_e choices of e and P_e its probability, a token
        router_z    ζ mean (log Σ_e exp x_e)²

    (arXiv:2101.03961, eq. 4-6, with f summed over A choices; arXiv:2202.08906, eq. 5). Means are
    over all layers together, as in Transformers, and over the tokens that `scope` says:

    - "micro": those of each part of a step, weighed by its tokens. A text that stands alone in a
      part has to be balanced by itself.
    - "sequence": those of each text, however texts are packed.
    - "global": those of the whole step. f, which no gradient passes, is that of all its parts
      (arXiv:2501.11873), so that parts add up to the loss of the step at once.

    Args:
        auxiliary: α; None to leave this loss out.
        z: ζ; None to leave this loss out.
        scope: over what experts are to be balanced.

    Raises:
        InputError: there is no such scope, or a weight is no number of at least 0.
    """

    def __init__(
        self,
        auxiliary: Schedule | float | None = 0.001,
        z: Schedule | float | None = None,
        *,
        scope: Scope = "micro",
    ) -> None:
        if scope not in get_args(Scope):
            raise InputError(f"scope={shown(scope)} is none of {', '.join(get_args(Scope))}")
        given = {"auxiliary": auxiliary, "router_z": z}
        self.weights = {
            name: weight_schedule(name, w) for name, w in given.items() if w is not None
        }
        self.scope = scope

    @property
    def of_whole_step(self) -> bool:
        """Whether it needs how often each expert is chosen in a whole step."""
        return self.scope == "global" and "auxiliary" in self.weights

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of texts or tokens."""
        count = texts_of(batch)[1] if self.scope == "sequence" else batch.tokens
        return dict.fromkeys(self.weights, count)

    def terms(self, routing: Routing, at: Progress) -> Mapping[str, Term]:
        """Return the sums over texts or tokens."""
        by_text = self.scope == "sequence"
        texts = routing.texts if by_text else torch.zeros_like(routing.texts)
        n = routing.count if by_text else 1
        of_tokens = {"auxiliary": self._auxiliary, "router_z": self._z}
        if by_text:
            tokens = routing.summed(sum_by_text(torch.ones_like(texts), texts, n))
        terms = {}
        for name, weight in self.weights.items():
            sums = of_tokens[name](routing, texts, n)
            total = (sums / tokens).sum() if by_text else sums.sum()
            terms[name] = Term(total, n if by_text else routing.tokens, weight.at(at))
        return terms

    def _auxiliary(self, routing: Routing, texts: Tensor, n: int) -> Tensor:
        """Return the loss of each of n texts times its tokens, (n,)."""
        chosen, probable = [], []
        for scores, indices in routing.per_layer():
            hits = torch.zeros_like(scores).scatter(1, indices, 1.0)
            chosen.append(sum_by_text(hits, texts, n))
            probable.append(sum_by_text(scores / scores.sum(dim=-1, keepdim=True), texts, n))
        if self.scope == "global" and routing.loads is not None:
            loads = routing.loads[: routing.depth]
            times = loads.sum(dim=0, keepdim=True).to(chosen[0])
        else:
            times = routing.summed(torch.stack(chosen).sum(dim=0))  # (n, E)
        A, E = routing.layers[0].router.active, times.shape[-1]
        f = A * times / times.sum(dim=-1, keepdim=True).clamp(min=1)
        return E * (f * torch.stack(probable).sum(dim=0) / routing.depth).sum(dim=-1)

    def _z(self, routing: Routing, texts: Tensor, n: int) -> Tensor:
        """Return the loss of each of n texts times its tokens, (n,)."""
        large = [layer.logits.logsumexp(dim=-1).square() for layer in routing.layers]
        return sum_by_text(torch.stack(large).sum(dim=0) / routing.depth, texts, n)
