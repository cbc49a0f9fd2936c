"""What kernels derive in float32 is what PyTorch derives in float64, which no kernel takes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, WIDE, Family
from quintet.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="there are no kernels")
# Two rows, with texts of several lengths or one each.
PACKED = [[1, 20, 3], [17, 7]]


def gradients(model: Any, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_gradients_of_kernels_are_those_without(family: Family, packed: bool) -> None:
    changes = {**family.shallow, **WIDE.get(family.name, {})}
    model = family.model_of(**changes).train()
    ids = torch.randint(3, 40, (2, 24))
    rows = PACKED if packed else [[24], [24]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    made = gradients(model, ids, positions)
    exact = gradients(model.double(), ids, positions)
    assert made.keys() == exact.keys()
    scale = max(float(x.norm()) for x in exact.values())
    off = {n: float((made[n] - x).norm()) / scale for n, x in exact.items()}
    # Without kernels, float32 leaves up to 1.2e-6 too.
    assert max(off.values()) < 2e-6, max(off, key=lambda name: off[name])
