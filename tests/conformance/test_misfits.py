"""A tensor that does not fit the others is PyTorch's to judge, whatever would have computed it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.families import WIDE, Family, each
from quintet import DynamicCache
from quintet.kernels import calls
from support import relative_error

IDS = torch.randint(101, (2, 3), generator=torch.Generator().manual_seed(3))


def misfits(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "another dtype", x.to(torch.float64)
    for axis, n in enumerate(x.shape):
        for m in (n - 1, 2 * n):
            yield f"{m} along {axis}", x.index_select(axis, torch.arange(m) % n)
    yield "an axis more", x[None]
    yield "turned", x.mT.contiguous().mT if x.ndim > 1 else torch.stack((x, x), dim=-1)[:, 0]


@torch.no_grad()
def outcome(model: Any) -> Any:
    try:
        return model(IDS, past_key_values=DynamicCache(model.config)).logits
    except Exception as error:
        # Which of equally good experts a token goes to is open, and so is the one it misses.
        return type(error), re.sub(r"index \d+", "index", str(error))


@each()
def test_a_weight_that_does_not_fit_fails_as_without_kernels(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.model_of(**{**WIDE[family.name], **family.rounded}).bfloat16()
    # Parameters of layers that are alike are treated alike.
    named = {
        name.translate({ord(d): None for d in "0123456789"}): name
        for name, _ in model.named_parameters()
    }
    for name in named.values():
        holder, _, own = name.rpartition(".")
        module = model.get_submodule(holder)
        weight = module.get_parameter(own)
        for label, other in misfits(weight.detach()):
            setattr(module, own, nn.Parameter(other, requires_grad=False))
            made = outcome(model)
            with monkeypatch.context() as without:
                without.setattr(calls, "available", lambda: False)
                expected = outcome(model)
            if isinstance(expected, Tensor):
                assert isinstance(made, Tensor), (name, label, made)
                assert relative_error(made.double(), expected.double()) <= 2**-4, (name, label)
            else:
                assert made == expected, (name, label)
        setattr(module, own, weight)
