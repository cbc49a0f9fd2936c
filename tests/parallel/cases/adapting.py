"""Cases of adapters that processes train together; each compares with one that trains alone."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.cases.tensor import family
from parallel.cases.training import BEGIN, config_of, gradients_of, objective_of, own, rows_of
from quintet.adapters.config import LoraConfig
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.source import ModelSource
from quintet.training.adapting import AdapterSettings, put_on_part
from quintet.training.config import TrainingConfig
from quintet.training.joining import joined, local_part, parallelize
from quintet.training.optimizers import build_optimizers
from quintet.training.optimizers.layout import LOCAL, Layout
from quintet.training.progress import Progress
from quintet.training.ranks import Alone, Ranks
from quintet.training.step import accumulate, take
from quintet.training.writing import whole_adapters
from support import relative_error

Learned = tuple[float, float, dict[str, Tensor]]


def adapted(name: str, changes: dict[str, Any], adapter: dict[str, Any]) -> CausalLMHead:
    model = family(name).model_of(**changes)
    torch.manual_seed(2)
    # As in the middle of a training: otherwise A has no gradient.
    model.add_adapter(LoraConfig(r=3, init_lora_weights=False, **adapter))
    return model.train()


def adds_to_all_scores(path: str) -> bool:
    """Tell whether a parameter has no gradient but rounding: a bias of keys changes nothing."""
    return "k_proj" in path and path.endswith("bias")


def adapted_part(name: str, folder: Path, config: TrainingConfig, ranks: Ranks) -> CausalLMHead:
    """Return the same as `adapted`, of which only a part is read."""
    part = local_part(config, ranks)
    assert part is not None
    assert config.adapter is not None
    cls = family(name).cls("ForCausalLM")
    source = ModelSource(folder)
    model = part.loaded(cls, source, dtype="float32", quantize=None, overrides={})
    torch.manual_seed(2)
    put_on_part(model, config.adapter)
    return model.train()


def learns(
    name: str,
    changes: dict[str, Any],
    degrees: dict[str, Any],
    adapter: dict[str, Any],
    folder: Path | None = None,
) -> None:
    """Compare loss, gradients, norm and some steps of an adapter, and what is to be saved of it.

    Args:
        folder: where each process reads its part of the model; None to divide the whole.
    """
    config = config_of(degrees)
    whole, (loss, norm, wanted) = _alone(name, json.dumps(changes), json.dumps(adapter))
    ranks = joined(config.parallel)
    if folder is None:
        model = adapted(name, changes, adapter)
    else:
        settings = AdapterSettings(r=3, lora_alpha=8.0, init_lora_weights=False, **adapter)
        config = replace(config, adapter=settings)
        model = adapted_part(name, folder, config, ranks)
        assert model.num_parameters() < 0.75 * whole.num_parameters()
    layout = parallelize(model, config, ranks, part=folder is not None)
    made_loss, made_norm, made = _learned(model, ranks, layout)
    assert abs(made_loss - loss) < 1e-5 * abs(loss)
    assert abs(made_norm - norm) < 1e-5 * norm
    # Of stages, each has the gradients of its own layers.
    held_here = {path for path, _ in model.named_parameters()}
    assert set(made) == set(wanted) & held_here
    for path, gradient in wanted.items():
        if path not in held_here or adds_to_all_scores(path):
            continue
        error = relative_error(made[path], gradient)
        assert error < 1e-5, f"{path}: {error}"
    of_whole = dict(whole.named_parameters())
    found_of_all = whole_adapters(model, layout, keep=ranks.first)
    assert not ranks.first or found_of_all.keys() == {n for n in of_whole if ".adapters." in n}
    for path, tensor in found_of_all.items():
        if not adds_to_all_scores(path):
            error = relative_error(tensor, of_whole[path].detach())
            assert error < 1e-4, f"{path}: {error}"


@cache
def _alone(name: str, changes: str, adapter: str) -> tuple[CausalLMHead, Learned]:
    # It is the same however the others divide it.
    model = adapted(name, json.loads(changes), json.loads(adapter))
    return model, _learned(model, Alone(), LOCAL)


def _learned(model: CausalLMHead, who: Ranks, where: Layout) -> Learned:
    """Return loss, norm and gradients of a step, after which come three more."""
    optimizers = build_optimizers(model, config_of({}).optimizer, where)
    parts = own(rows_of(0, 4), who)
    outcome = accumulate(
        model, objective_of(model, {}), parts, BEGIN, torch.enable_grad, who, where
    )
    gradients = gradients_of(model, optimizers)
    norm = sum(value**2 for value in optimizers.scalars().values()) ** 0.5
    optimizers.zero_grad()
    for step in range(1, 4):
        parts = own(rows_of(step, 4), who)
        at = Progress(step, 0, step / 4)
        take(model, objective_of(model, {}), optimizers, parts, at, torch.enable_grad, who)
    return outcome.loss, norm, gradients
