"""Weights that accelerate keeps elsewhere between the calls of a forward, and its training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)

import quintet
from conformance.families import FAMILIES, Family, each

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
CPU = torch.device("cpu")
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, path: cpu_offload(model, execution_device=CPU),
    "cpu-with-buffers": lambda model, path: cpu_offload(
        model, execution_device=CPU, offload_buffers=True
    ),
    "disk": lambda model, path: disk_offload(model, str(path), execution_device=CPU),
}


@each
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_offloaded_weights(family: Family, way: str, tied: bool, tmp_path: Path) -> None:
    model, plain = (family.model_of(tie_word_embeddings=tied) for _ in range(2))
    WAYS[way](model, tmp_path)
    assert next(model.parameters()).is_meta
    assert model.device == CPU
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=3), plain.generate(IDS, max_new_tokens=3))


def test_without_memory_anywhere_there_is_no_device() -> None:
    with torch.device("meta"):
        model = quintet.Qwen2Model(FAMILIES[0].config())
    model.rotary_emb.to("meta")
    assert model.device == torch.device("meta")


@each
@pytest.mark.filterwarnings("ignore:.*requires .* bytes of buffer:UserWarning")
def test_layers_are_not_split(family: Family) -> None:
    model = family.model_of()
    sizes = {"cpu": 10**9, "disk": 10**9, 0: 1}
    found = infer_auto_device_map(model, sizes, no_split_module_classes=[*model._no_split_modules])
    assert all(name.count(".") <= 2 for name in found)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[4]], ids=str)
@torch.no_grad()
def test_checkpoints_are_dispatched(family: Family, tmp_path: Path) -> None:
    plain = family.model_of(tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = type(plain)(quintet.AutoConfig.from_pretrained(tmp_path))
    # What is made there is not tied any more.
    empty.tie_weights()
    model = load_checkpoint_and_dispatch(empty, str(tmp_path), device_map="auto").eval()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loop_of_accelerate(family: Family, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = family.model_of().train()
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    before = plain.lm_head.weight.clone()
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(plain.lm_head.weight, before)
    trained = plain.eval()(IDS).logits.detach()
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=False)
    with torch.no_grad():
        plain.lm_head.weight.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(plain(IDS).logits, trained)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "model",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    again = family.cls("ForCausalLM").from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, trained)
