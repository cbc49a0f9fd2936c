"""Cases of models that the one which trains is compared with, of which each process has a part."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from parallel.cases.tensor import family
from parallel.cases.training import Learned, compare, config_of, learned, pairs_of, rows_of
from quintet.modeling.heads import CausalLMHead
from quintet.training.batch import Batch
from quintet.training.building import build_objective
from quintet.training.config import DistillationSettings, PreferenceSettings
from quintet.training.joining import joined, reference_loader
from quintet.training.objective import Objective
from quintet.training.objectives import Distillation, Preference
from quintet.training.settings import SettingError

KINDS: dict[str, Callable[[list[Batch]], list[Batch]]] = {
    "distillation": list,
    "preference": pairs_of,
}


def settings_of(kind: str, folder: Path) -> DistillationSettings | PreferenceSettings:
    if kind == "preference":
        return PreferenceSettings(kind="preference", reference=str(folder))
    return DistillationSettings(
        kind="distillation", teacher=str(folder), temperature=2.0, share=0.5
    )


@cache
def learned_alone(name: str, kind: str, folder: Path) -> Learned:
    whole = family(name).cls("ForCausalLM").from_pretrained(folder).requires_grad_(False)
    objective: Objective = (
        Preference(reference=whole) if kind == "preference" else Distillation(whole, 2.0, 0.5)
    )
    return learned(family(name).model_of().train(), objective, KINDS[kind](rows_of(0, 4)))


def learns(name: str, folder: Path, degrees: dict[str, Any]) -> None:
    """Compare losses and gradients of what is learned of a model in a folder."""
    for kind in KINDS:
        config = replace(config_of(degrees), objective=settings_of(kind, folder))
        found: list[Objective] = []

        def objective_of(
            model: CausalLMHead, config: Any = config, found: Any = found
        ) -> Objective:
            found.append(
                build_objective(config, model, references=reference_loader(joined(config.parallel)))
            )
            made: Objective = found[0]
            return made

        alone = learned_alone(name, kind, folder)
        compare(name, {}, degrees, KINDS[kind], objective_of, alone)
        (objective,) = found
        assert isinstance(objective, Distillation | Preference)
        other = objective.teacher if isinstance(objective, Distillation) else objective.reference
        assert isinstance(other, CausalLMHead)
        if degrees.get("cp") != 2 and degrees.get("dp") != 2:
            assert held(other) < 0.75 * family(name).model_of().num_parameters()


def held(model: CausalLMHead) -> int:
    """Return how many numbers of a model are here for good: slices, of what is sliced."""
    from torch.distributed.tensor import DTensor

    parameters = model.parameters()
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)


def refused(folder: Path, degrees: dict[str, Any]) -> str:
    """Return what a model beside is refused with."""
    config = replace(config_of(degrees), objective=settings_of("distillation", folder))
    model = family("qwen2").model_of()
    with pytest.raises(SettingError) as told:
        build_objective(config, model, references=reference_loader(joined(config.parallel)))
    return str(told.value)
