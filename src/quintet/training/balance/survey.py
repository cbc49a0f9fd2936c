"""Counts each expert's tokens over a whole step before training on it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from quintet.modeling.balance import ExpertLoads
from quintet.training.batch import Batch


def loads_of_step(
    model: nn.Module, parts: Iterable[Batch], run: Callable[[Batch], object]
) -> Tensor:
    """Return the load of each expert in all parts of a step, (L, E), by running them.

    Losses of the whole step (`BalanceLoss.of_whole_step`) need that before the first part is
    learned from. Nothing is learned, counted or drawn here that a step would notice: dropout falls
    the same way afterwards as without it.

    Args:
        model: whose experts.
        parts: all parts of the step.
        run: what a part goes through, up to the last layer with experts; a head is not needed.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExpertLoads(model) as loads:
        with (
            torch.inference_mode(),
            torch.random.fork_rng([index for index in devices if index is not None]),
        ):
            for part in parts:
                run(part)
        return loads.loads()
