"""Programs recorded once serve other lengths, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import Family, each
from quintet.errors import UnsupportedBackendError
from support import relative_error

IDS = torch.randint(1, 101, (2, 70), generator=torch.Generator().manual_seed(5))
LENGTHS = (9, 23, 70)


def given(T: int, padding: int) -> dict[str, Any]:
    ids = IDS[:, :T].clone()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def agree(model: Any, recorded: Any, padding: int) -> None:
    for T in LENGTHS:
        said = given(T, padding)
        made, right = recorded(**said).logits, model(**said).logits
        shown = said["attention_mask"] != 0
        assert relative_error(made[shown], right[shown]) < TOLERANCE, T


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]


@torch.no_grad()
@each
def test_an_exported_program_takes_any_length(family: Family) -> None:
    model = family.model_of(**family.shallow)
    T = torch.export.Dim("T", min=2, max=128)
    said = given(9, 4)
    shapes = {name: {1: T} if isinstance(x, Tensor) else None for name, x in said.items()}
    program = torch.export.export(model, (), said, dynamic_shapes=shapes).module()
    # It was recorded of one padding, and has to serve others.
    for padding in (0, 4, 7):
        agree(model, program, padding)


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
@each
def test_a_trace_of_a_mask_of_ones_takes_padding(family: Family) -> None:
    model = family.model_of(**family.shallow)
    ids, ones = IDS[:, :9], torch.ones(2, 9, dtype=torch.long)
    if family.routes(model.config):
        with pytest.raises(UnsupportedBackendError, match=r"torch\.export"):
            torch.jit.trace(Logits(model), (ids, ones), check_trace=False)
        return
    traced = torch.jit.trace(Logits(model), (ids, ones), check_trace=False)
    padded = ones.clone()
    padded[0, :4] = 0
    for mask in (ones, padded):
        right = model(ids, attention_mask=mask, use_cache=False).logits
        assert relative_error(traced(ids, mask)[mask != 0], right[mask != 0]) < TOLERANCE


@torch.no_grad()
@each
def test_one_graph_is_compiled_for_many_lengths(family: Family) -> None:
    torch.compiler.reset()
    model = family.model_of(**family.shallow)
    program = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for T in LENGTHS:
        ids = IDS[:, :T].clone()
        made = program(input_ids=ids, use_cache=False).logits
        right = model(input_ids=ids, use_cache=False).logits
        assert relative_error(made, right) < TOLERANCE, T
