"""What is planned, against the bytes that models of all families really take here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance.families import FAMILIES, WIDE, Family
from quintet import AutoConfig, AutoModelForCausalLM, StaticCache
from quintet.checkpoint.remote import read_headers
from quintet.planning.devices import device
from quintet.planning.inference import Workload, footprint
from quintet.planning.plans import described
from quintet.planning.training import Training, training_footprint
from quintet.planning.world import Split
from quintet.training.optimizers import OptimizerSettings, build_optimizers
from quintet.training.progress import Progress

each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
HERE, ALONE = device("cpu"), Split()
# Large enough that what is counted is most of it.
LARGER: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128, "intermediate_size": 352},
    "qwen2-moe": {"hidden_size": 128, "moe_intermediate_size": 64},
    "zamba2": {"hidden_size": 128, "vocab_size": 300},
    "deepseek-v2": {"hidden_size": 128, "moe_intermediate_size": 64},
    "deepseek-v3": {"hidden_size": 128, "moe_intermediate_size": 64},
}


def made(family: Family) -> Any:
    return family.model_of(**{**WIDE[family.name], **LARGER[family.name]})


def held(model: nn.Module) -> int:
    """The bytes of all that a model holds, what is shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def close(planned: float, measured: float) -> bool:
    return abs(planned / measured - 1) <= 0.05


@each_family
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_weights_are_held_in_the_bytes_planned(
    family: Family, quantize: str | None, tmp_path: Path
) -> None:
    made(family).save_pretrained(tmp_path)
    options = {} if quantize is None else {"quantize": quantize}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    planned, _ = described(model.config, HERE, quantize=quantize or "none")
    assert close(footprint(planned, ALONE, Workload(16)).weights, held(model))


@each_family
@torch.no_grad()
def test_a_prompt_leaves_the_cache_planned(family: Family) -> None:
    model = made(family)
    planned, _ = described(model.config, HERE, dtype=torch.float32)
    ids = torch.arange(2 * 24).reshape(2, 24) % 90 + 3
    cache = StaticCache(model.config, max_cache_len=24)
    model(ids, past_key_values=cache)
    work = Workload(24, rows=2, itemsize=4, cache_dtype="float32")
    assert close(footprint(planned, ALONE, work).cache, cache.nbytes)


@each_family
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_training_leaves_the_states_planned(
    family: Family, kind: Any, precision: Any
) -> None:
    model = made(family).train()
    planned, _ = described(model.config, HERE)
    settings = OptimizerSettings(kind=kind, precision=precision)
    ids = torch.arange(2 * 24).reshape(2, 24) % 90 + 3
    with build_optimizers(model, settings) as optimizers:
        logits = model(ids).logits.float()
        # All parameters learn, those of prediction layers too.
        (logits.sum() + sum(p.float().sum() for p in model.parameters())).backward()
        names = [name for name, _ in model.named_parameters()]
        found = [optimizers.gradient(name) for name in names]
        gradients = sum(g.nbytes for g in found if g is not None)
        optimizers.step(Progress(0, 0, 0.0))
        states = sum(t.nbytes for t in optimizers.tensors().values())
    work = Training(24, rows=2, itemsize=4 if precision == "float32" else 2, optimizer=kind)
    memory = training_footprint(planned, ALONE, work)
    assert close(memory.gradients, gradients)
    stepped = memory.weights + memory.optimizer + memory.copies
    assert close(stepped, held(model) + states)


def test_a_file_of_many_formats_is_held_in_the_bytes_planned(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("smollm2", dtype=torch.bfloat16)
    tensors = read_headers("smollm2", local_files_only=True).tensors
    config = AutoConfig.from_pretrained("smollm2")
    planned, _ = described(config, HERE, tensors=tensors)
    assert close(footprint(planned, ALONE, Workload(16)).weights, held(model))
