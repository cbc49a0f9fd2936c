"""Adapters over weights in fewer bits, in narrow dtypes, and on several rows of an engine."""

from pathlib import Path

import pytest
import torch

import quintet
from conformance.families import FAMILIES, Family, each
from pefts import ATTENTION, IDS, logits
from quintet.quantization import Quantized
from support import relative_error as relative

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def config(family: Family) -> quintet.LoraConfig:
    experts = family.name in ("qwen2-moe", "deepseek-v2", "deepseek-v3")
    return quintet.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=[*ATTENTION[family.name], "embed_tokens"],
        target_parameters=EXPERTS if experts else None,
        init_lora_weights=False,
    )


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        *((family, quantize) for family in FAMILIES for quantize in ("int8", "int4", "fp8")),
        (FAMILIES[1], "nf4"),
    ],
    ids=str,
)
def test_over_weights_in_fewer_bits(family: Family, quantize: str, tmp_path: Path) -> None:
    plain = family.model_of(tie_word_embeddings=False)
    plain.save_pretrained(tmp_path / "base")
    plain.add_adapter(config(family))
    plain.save_pretrained(tmp_path / "adapter")
    cls = family.cls("ForCausalLM")
    # The same numbers, once as they are held and once as numbers.
    held = cls.from_pretrained(tmp_path / "base", quantize=quantize)
    base = logits(held)
    held.load_adapter(tmp_path / "adapter")
    made = logits(held)
    held.save_pretrained(tmp_path / "again")
    held.merge_adapter()
    merged = logits(held)
    assert relative(merged, made) < 2e-3
    held.unmerge_adapter()
    assert torch.equal(logits(held), made)
    held.disable_adapters()
    assert torch.equal(logits(held), base)
    held.enable_adapters()
    whole = held.merge_and_unload()
    assert torch.equal(logits(whole), merged)
    names = {
        path.rpartition(".")[2] for path, m in whole.named_modules() if isinstance(m, Quantized)
    }
    assert not names & {*ATTENTION[family.name], "experts"}
    assert relative(made, base) > 1e-3


@each
def test_dora_over_int8_is_of_the_decoded_weights(family: Family, tmp_path: Path) -> None:
    family.model_of(tie_word_embeddings=False).save_pretrained(tmp_path)
    held, numbers = (
        family.cls("ForCausalLM").from_pretrained(tmp_path, quantize="int8") for _ in range(2)
    )
    dora = quintet.LoraConfig(
        target_modules=ATTENTION[family.name], use_dora=True, init_lora_weights=False
    )
    for model in (held, numbers):
        torch.manual_seed(0)
        model.add_adapter(dora)
    numbers.merge_and_unload()
    assert relative(logits(held), logits(numbers)) < 2e-3


@each
def test_an_adapter_over_int8_learns(family: Family, tmp_path: Path) -> None:
    family.model_of(tie_word_embeddings=False).save_pretrained(tmp_path)
    model = family.cls("ForCausalLM").from_pretrained(tmp_path, quantize="int8")
    model.add_adapter(config(family))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
