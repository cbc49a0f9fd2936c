"""torch.export, ONNX and torch.compile of a forward: once, for any number of rows and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family, each
from outside import tool
from support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")
AUTO = torch.export.Dim.AUTO
ANY = {0: AUTO, 1: AUTO}


class Logits(nn.Module):
    """What is exported: a function of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def padded(rows: int, width: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 101, (rows, width), generator=torch.Generator().manual_seed(width))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def same(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> bool:
    real = mask.bool()
    return relative_error(found[real], wanted[real]) < TOLERANCE


@each
@torch.no_grad()
def test_one_export_serves_any_batch(family: Family, tmp_path: Path) -> None:
    model = Logits(family.model_of(**family.shallow).requires_grad_(False))
    made = torch.export.export(model, padded(2, 9, 3), dynamic_shapes=(ANY, ANY))
    torch.export.save(made, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (padded(3, 14, 5), padded(2, 5, 0)):
        assert same(again(*batch), model(*batch), batch[1])


# Experts are multiplied by an operation of this library, which ONNX does not know.
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[4]], ids=str)
@torch.no_grad()
def test_onnx(family: Family, tmp_path: Path) -> None:
    tool("onnxscript")
    runtime = tool("onnxruntime")
    model = Logits(family.model_of(**family.shallow).requires_grad_(False))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, padded(2, 9, 3), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    for batch in (padded(2, 9, 3), padded(2, 9, 1)):
        names = [given.name for given in session.get_inputs()]
        given = {n: x.numpy() for n, x in zip(names, batch, strict=True)}
        found = torch.from_numpy(session.run(None, given)[0])
        assert same(found, model(*batch), batch[1])


@each
@torch.no_grad()
def test_one_program_serves_any_batch(family: Family) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = family.model_of(**family.shallow).requires_grad_(False)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for ids, mask in (padded(2, 9, 3), padded(3, 14, 5), padded(2, 12, 1)):
        options = {"attention_mask": mask, "use_cache": False}
        assert same(compiled(ids, **options).logits, model(ids, **options).logits, mask)
    assert counter.frame_count == 1
