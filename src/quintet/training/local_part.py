"""The part of a model that a process holds while it is built: everything, or less."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quintet.configuration.base import PreTrainedConfig
from quintet.modeling.core import ModelCore
from quintet.modeling.fresh import new_model
from quintet.modeling.loading import Options, load
from quintet.modeling.source import ModelSource
from quintet.parallel.slices import ParameterSlices
from quintet.parallel.world import World

Model = TypeVar("Model", bound=ModelCore)


@dataclass(frozen=True, slots=True)
class LocalPart:
    """A part of a model.

    Attributes:
        world: the processes that have the others.
        slices: which rows of its part of each parameter this process has; None for all.
        learns: whether it is trained; what is not may stay in its file.
    """

    world: World
    slices: ParameterSlices | None
    learns: bool = True

    def new(self, cls: type[Model], config: PreTrainedConfig, dtype: torch.dtype) -> Model:
        """Return its part of a model of random weights; all processes have to call this.

        Raises:
            InputError: it cannot be divided so.
        """
        return new_model(cls, config, dtype, world=self.world, slices=self.slices)

    def loaded(
        self,
        cls: type[Model],
        source: ModelSource,
        *,
        dtype: str,
        quantize: str | None,
        overrides: dict[str, Any],
    ) -> Model:
        """Load its part of a checkpoint, and read no more; all processes have to call this.

        Raises:
            QuintetError: it cannot be read, or divided so.
        """
        options = Options(
            dtype=dtype,
            quantize=quantize,
            world=self.world,
            slices=self.slices,
            learns=self.learns,
        )
        return load(cls, source, None, overrides, options)[0]
