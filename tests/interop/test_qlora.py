"""PEFT's adapters on weights in fewer bits: as on the numbers these stand for, and merged."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.families import FAMILIES, Family, each
from quintet.interop import as_transformers
from support import relative_error as relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 5]])
FORMATS = ["int8", "int4", "nf4", "fp8"]
# Kernels round vectors, too.
TOLERANCE = 1e-3


def config(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **options})


def loaded(family: Family, path: Path, quantize: str) -> tuple[Any, Any]:
    """A model in a format, and one of the numbers that its weights stand for."""
    family.model_of(**family.shallow).save_pretrained(path / "plain")
    cls = family.cls("ForCausalLM")
    held = cls.from_pretrained(path / "plain", quantize=quantize)
    held.save_pretrained(path / "held")
    plain = cls.from_pretrained(path / "held", quantize="none", dtype=torch.float32)
    return as_transformers(held), as_transformers(plain)


def trained(model: Any, adapter: Any) -> Any:
    """Put an adapter on a model, and find its gradients."""
    model = peft.prepare_model_for_kbit_training(model)
    made = peft.get_peft_model(model, config())
    peft.set_peft_model_state_dict(made, adapter)
    made.train()
    made(input_ids=IDS, labels=IDS).loss.backward()
    return made.eval()


def adapter_of(model: Any) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(copy.deepcopy(model), config(init_lora_weights=False))
    return peft.get_peft_model_state_dict(made)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantize", FORMATS[:3])
@each
def test_an_adapter_learns_as_on_plain_numbers(
    family: Family, quantize: str, tmp_path: Path
) -> None:
    held, plain = loaded(family, tmp_path, quantize)
    assert held.is_loaded_in_8bit != held.is_loaded_in_4bit
    # Experts in fewer bits take none, those of plain numbers would.
    before, adapter = logits(held), adapter_of(held)
    here, there = trained(held, adapter), trained(plain, adapter)
    assert here.base_model.model.is_gradient_checkpointing
    assert relative(logits(here), logits(there)) < TOLERANCE
    assert relative(logits(here), before) > 1e-3
    grads = [
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for model in (here, there)
    ]
    assert len(grads[0]) == len(adapter)
    assert all(relative(grads[0][name], grads[1][name]) < 5e-3 for name in grads[0])

    here.save_pretrained(tmp_path / "adapter")
    cls = family.cls("ForCausalLM")
    fresh = as_transformers(cls.from_pretrained(tmp_path / "held"))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(here))
    made = [m.generate(input_ids=IDS, max_new_tokens=3) for m in (again, here)]
    assert torch.equal(*made)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.filterwarnings("ignore:a weight is rounded to:UserWarning")
def test_merged_weights_are_rounded_again(quantize: str, tmp_path: Path) -> None:
    family = FAMILIES[0]
    held, plain = loaded(family, tmp_path, quantize)
    adapter = adapter_of(plain)
    merged = trained(held, adapter).merge_and_unload()
    whole = trained(plain, adapter).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    cls = family.cls("ForCausalLM")
    wanted = cls.from_pretrained(tmp_path / "whole", quantize=quantize)
    # The scales of int4 are searched for, and those of what was rounded before may be others.
    bound = 0.1 if quantize == "int4" else TOLERANCE
    assert relative(logits(merged), logits(wanted)) < bound
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "merged")), logits(merged))


def test_merging_says_that_it_rounds(tmp_path: Path) -> None:
    held, plain = loaded(FAMILIES[0], tmp_path, "int4")
    with pytest.warns(UserWarning, match="rounded to int4 by 32 with offsets again"):
        trained(held, adapter_of(plain)).merge_and_unload()


@each
def test_what_is_made_float32_around_weights_in_few_bits(family: Family, tmp_path: Path) -> None:
    changes = {**family.shallow, "tie_word_embeddings": True}
    family.model_of(**changes).bfloat16().save_pretrained(tmp_path)
    model = as_transformers(family.cls("ForCausalLM").from_pretrained(tmp_path, quantize="int8"))
    # It casts all parameters; vectors of tied ids are none.
    model = peft.prepare_model_for_kbit_training(model)
    made = peft.get_peft_model(model, config()).eval()
    assert made.generate(input_ids=IDS, max_new_tokens=3).shape == (2, 8)
    assert logits(made).dtype == torch.float32


def test_dora_reads_the_numbers(tmp_path: Path) -> None:
    held, plain = loaded(FAMILIES[0], tmp_path, "int8")
    made = []
    for model in (held, plain):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config(use_dora=True, init_lora_weights=False))
        made.append(logits(adapted.eval()))
    assert relative(*made) < TOLERANCE


def test_bridged_maps_are_copied_pickled_and_as_fast(tmp_path: Path) -> None:
    held, _ = loaded(FAMILIES[0], tmp_path, "int8")
    plain = FAMILIES[0].cls("ForCausalLM").from_pretrained(tmp_path / "held")
    first = held.model.layers[0].mlp.up_proj
    assert isinstance(first, nn.Linear)
    assert not isinstance(plain.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.equal(logits(held), logits(plain))
    assert held.state_dict().keys() == plain.state_dict().keys()
    for again in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert type(again.model.layers[0].mlp.up_proj) is type(first)
        assert torch.equal(logits(again), logits(held))


def test_a_weight_is_read_as_numbers(tmp_path: Path) -> None:
    held, plain = loaded(FAMILIES[0], tmp_path, "nf4")
    weight = held.model.layers[0].mlp.down_proj.weight
    numbers = plain.model.layers[0].mlp.down_proj.weight
    assert weight.shape == numbers.shape
    assert weight.dtype == torch.float32
    assert torch.equal(weight + 0, numbers)
    assert torch.equal(weight.data, numbers)
    assert type(weight @ weight.T) is torch.Tensor
