"""Gradients pass through weights in fewer bits as through the numbers these stand for."""

from pathlib import Path

import pytest
import torch

from conformance.families import Family, each
from support import relative_error

IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4", "fp8"])
@each
def test_inputs_get_the_gradients_of_plain_numbers(
    family: Family, quantize: str, tmp_path: Path
) -> None:
    cls = family.cls("ForCausalLM")
    family.model_of(**family.shallow).save_pretrained(tmp_path)
    held = cls.from_pretrained(tmp_path, quantize=quantize)
    held.save_pretrained(tmp_path / "held")
    plain = cls.from_pretrained(tmp_path / "held", quantize="none", dtype=torch.float32)
    found = []
    for model in (held.train(), plain.train()):
        model.requires_grad_(False)
        vectors = model.get_input_embeddings()(IDS).detach().float().requires_grad_(True)
        loss = model(inputs_embeds=vectors, labels=IDS).loss
        loss.backward()
        assert vectors.grad is not None
        found.append((loss.detach(), vectors.grad))
    assert relative_error(found[0][0], found[1][0]) < 1e-4
    assert relative_error(found[0][1], found[1][1]) < 1e-3


def test_a_bias_learns_where_its_matrix_does_not(tmp_path: Path) -> None:
    from conformance.families import FAMILIES

    FAMILIES[0].model_of().save_pretrained(tmp_path)
    model = FAMILIES[0].cls("ForCausalLM").from_pretrained(tmp_path, quantize="int8")
    bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0
