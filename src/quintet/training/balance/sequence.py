"""DeepSeek-V3's loss of unbalanced texts."""

from collections.abc import Mapping

import torch

from quintet.ops.routing import balance_by_text
from quintet.training.balance.routing import Routing, texts_of
from quintet.training.balance.weights import weight_schedule
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.progress import Progress
from quintet.training.schedule import Schedule


class SequenceBalance:
    """Keeps any one text from sending its tokens to few experts (arXiv:2412.19437, eq. 17-20).

    α Σ_e f_e P_e of a text of T tokens in a layer, with f_e = E/(A T) Σ_t 1[s_te is among the A
    largest], P_e = 1/T Σ_t s'_te and s' = s / Σ_e s. The A largest affinities are meant, whatever
    bias and groups made of them. It is summed over layers and averaged over texts.

    Args:
        alpha: α.

    Raises:
        InputError: α is no number of at least 0.
    """

    of_whole_step = False

    def __init__(self, alpha: Schedule | float = 1e-4) -> None:
        self.alpha = weight_schedule("alpha", alpha)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of texts."""
        return {"sequence_balance": texts_of(batch)[1]}

    def terms(self, routing: Routing, at: Progress) -> Mapping[str, Term]:
        """Return the sum over texts and layers."""
        losses = []
        for layer in routing.layers:
            scores = layer.affinities()
            largest = scores.detach().topk(layer.router.active, dim=-1).indices
            shares = scores / scores.sum(dim=-1, keepdim=True)
            f, P, _ = balance_by_text(shares, largest, routing.texts, routing.count, routing.summed)
            losses.append((f * P).sum())
        total = torch.stack(losses).sum()
        return {"sequence_balance": Term(total, routing.count, self.alpha.at(at))}
