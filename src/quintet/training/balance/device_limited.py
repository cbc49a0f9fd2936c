"""DeepSeek-V2's losses: of unbalanced experts, devices, and messages between devices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.routing import balance_by_text, sum_by_text
from quintet.training.balance.routing import Routing, texts_of
from quintet.training.balance.weights import weight_schedule
from quintet.training.batch import Batch
from quintet.training.objective import Term
from quintet.training.progress import Progress
from quintet.training.schedule import Schedule

NAMES = ("expert_balance", "device_balance", "communication_balance")


class DeviceLimitedBalance:
    """Spreads each text over experts, and over devices that hold them (arXiv:2405.04434, §2.2.3).

    Of a text of T tokens in a layer, with f_e = E/(A T) Σ_t 1[t is sent to e] and
    P_e = 1/T Σ_t s_te:

        expert_balance          α1 Σ_e f_e P_e
        device_balance          α2 Σ_d f'_d P'_d     f'_d the mean of f, P'_d the sum of P on d
        communication_balance   α3 Σ_d f''_d P'_d    f''_d = D/(M T) Σ_t 1[t is sent to d]

    Each is summed over layers and averaged over texts. Devices hold equally many experts, in their
    order, as the groups of a router do.

    Args:
        expert: α1; None to leave this loss out.
        device: α2; None to leave this loss out.
        communication: α3; None to leave this loss out.
        devices: D.
        reached: M, how many devices a token is sent to at most.

    Raises:
        InputError: a weight is no number of at least 0, or D and M are no such numbers.
    """

    of_whole_step = False

    def __init__(
        self,
        expert: Schedule | float | None = 0.003,
        device: Schedule | float | None = 0.05,
        communication: Schedule | float | None = 0.02,
        *,
        devices: int = 8,
        reached: int = 3,
    ) -> None:
        if not 1 <= reached <= devices:
            raise InputError(
                f"reached={reached} of devices={devices}: a token is sent to at least one device, "
                "and to no more than there are"
            )
        given = zip(NAMES, (expert, device, communication), strict=True)
        self.weights = {name: weight_schedule(name, w) for name, w in given if w is not None}
        self.devices, self.reached = devices, reached

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Return the number of texts."""
        return dict.fromkeys(self.weights, texts_of(batch)[1])

    def terms(self, routing: Routing, at: Progress) -> Mapping[str, Term]:
        """Return the sums over texts and layers.

        Raises:
            InputError: the experts cannot be divided among so many devices.
        """
        layers = [self._layer(s, i, routing) for s, i in routing.per_layer()]
        totals = dict(zip(NAMES, torch.stack(layers).sum(dim=0), strict=True))
        return {
            name: Term(totals[name], routing.count, weight.at(at))
            for name, weight in self.weights.items()
        }

    def _layer(self, scores: Tensor, indices: Tensor, routing: Routing) -> Tensor:
        """Return the three losses of a layer, summed over texts, (3,)."""
        D, n, E = self.devices, routing.count, scores.shape[-1]
        if E % D:
            raise InputError(
                f"devices={D} cannot hold {E} experts, equally many each; give a divisor of {E}"
            )
        f, P, tokens = balance_by_text(scores, indices, routing.texts, n, routing.summed)
        on_device = P.view(n, D, E // D).sum(dim=-1)
        sent = torch.zeros_like(scores[:, :D]).scatter(1, indices // (E // D), 1.0)
        sent = routing.summed(sum_by_text(sent, routing.texts, n))
        sent = sent * (D / self.reached) / tokens[:, None]
        return torch.stack(
            (
                (f * P).sum(),
                (f.view(n, D, E // D).mean(dim=-1) * on_device).sum(),
                (sent * on_device).sum(),
            )
        )
