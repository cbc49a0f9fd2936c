"""The table `[optimizer]`."""

import math
from dataclasses import dataclass
from typing import Literal

from quintet.training.schedules import Number
from quintet.training.settings import SettingError

Kind = Literal["adamw", "muon"]
Precision = Literal["float32", "autocast", "bfloat16"]
Role = Literal["matrix", "embedding", "head", "router", "norm", "bias", "state", "conv", "adapter"]

# Moves with every step by the same factor, whatever its gradient: nothing to be held down.
_NEVER_DECAYED: tuple[Role, ...] = ("norm", "bias", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """Overrides for some parameters: `[[optimizer.groups]]`.

    Attributes:
        match: patterns of their names (`*.mlp.experts.*`), or roles (`embedding`); the first
            group that has one that fits takes a parameter.
        kind: who moves them, if not who would by their role.
        learning_rate: the factor of the learning rate.
        weight_decay: instead of the training's.
        frozen: they are not trained at all.
        matrices: of how many matrices, one above the other, each of them is made, for Muon.
    """

    match: tuple[str, ...]
    kind: Kind | None = None
    learning_rate: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False
    matrices: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot be carried out."""
        if not self.match:
            raise SettingError.value("match", self.match, "has to name roles or patterns of names")
        _at_least_0(self.learning_rate, "learning_rate")
        if self.weight_decay is not None:
            _at_least_0(self.weight_decay, "weight_decay")
        if self.matrices is not None and self.matrices < 1:
            raise SettingError.value("matrices", self.matrices, "has to be 1 or more")
        given = (self.kind, self.learning_rate, self.weight_decay, self.matrices)
        if self.frozen and given != (None, 1.0, None, None):
            raise SettingError.value(
                "frozen", self.frozen, "leaves nothing else to be said of the group; take that out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """The table `[optimizer]`.

    Attributes:
        kind: "muon" moves the matrices of the layers by Muon and the rest by AdamW.
        learning_rate: the factor of the schedule.
        schedule: what share of it a step has: 1, or a table with its kind.
        adamw_learning_rate: the factor for what AdamW moves beside Muon; `learning_rate` if None.
        weight_decay: λ of w -= ηλw.
        undecayed: the roles of parameters that do not decay.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        nesterov: whether Muon looks one gradient ahead of its momentum.
        by_head: whether what makes queries, keys and values is a matrix a head to Muon.
        max_norm: the norm to which the gradient is clipped; inf not at all.
        precision: "float32"; "autocast", weights in float32 that are multiplied in bfloat16; or
            "bfloat16", weights in bfloat16 with masters in float32.
        groups: what is different for some parameters.
    """

    kind: Kind = "adamw"
    learning_rate: float = 3e-4
    schedule: Number = 1.0
    adamw_learning_rate: float | None = None
    weight_decay: float = 0.1
    undecayed: tuple[Role, ...] = _NEVER_DECAYED
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool = True
    by_head: bool = True
    max_norm: float = 1.0
    precision: Precision = "float32"
    groups: tuple[GroupSettings, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that cannot be carried out."""
        _at_least_0(self.learning_rate, "learning_rate")
        _at_least_0(self.weight_decay, "weight_decay")
        _at_least_0(self.eps, "eps")
        if self.adamw_learning_rate is not None:
            _at_least_0(self.adamw_learning_rate, "adamw_learning_rate")
            if self.kind == "adamw":
                raise SettingError.value(
                    "adamw_learning_rate",
                    self.adamw_learning_rate,
                    'is for what AdamW moves beside kind = "muon"; write learning_rate',
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError.value("betas", self.betas, "has to be two numbers, 0 to below 1")
        if not 0 <= self.momentum < 1:
            raise SettingError.value("momentum", self.momentum, "has to be 0 to below 1")
        if not self.max_norm > 0:
            raise SettingError.value(
                "max_norm", self.max_norm, "has to be above 0; inf does not clip"
            )


def _at_least_0(value: float, key: str) -> None:
    if not 0 <= value < math.inf:
        raise SettingError.value(key, value, "has to be a finite number, 0 or more")
