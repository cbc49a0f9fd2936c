"""Optimisers: AdamW, Muon, parameter groups, states."""

from quintet.training.optimizers.building import Optimizers, build_optimizers
from quintet.training.optimizers.settings import GroupSettings, OptimizerSettings, Precision

__all__ = [
    "GroupSettings",
    "OptimizerSettings",
    "Optimizers",
    "Precision",
    "build_optimizers",
]
