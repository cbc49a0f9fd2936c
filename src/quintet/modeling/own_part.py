"""Cuts a model down to this process's part, before and after loading."""

from collections.abc import Mapping
from functools import partial

import torch

from quintet.modeling.core import ModelCore
from quintet.parallel.apply import connect, divide
from quintet.parallel.slices import ParameterSlices
from quintet.parallel.stage import leave_out
from quintet.parallel.stages import names_of_process, stages_to_run
from quintet.parallel.world import World
from quintet.quantization import Slot, check_divided


class OwnPart:
    """Loads this process's part of a sharded model.

    Attributes:
        shards: what this process has of each tensor, by its name.
        local_names: the names of the tensors that it has anything of; None for all.

    Args:
        model: whole, and without memory; it is cut.
        world: the processes.
        dtype: of what is not kept in float32.
        slices: which rows of its part of each parameter this process has; None for all.

    Raises:
        InputError: it cannot be cut so.
    """

    def __init__(
        self,
        model: ModelCore,
        world: World,
        dtype: torch.dtype,
        slices: ParameterSlices | None = None,
    ) -> None:
        self.world = world
        self._stages = stages_to_run(model, world)
        sliced = None
        if slices is not None:
            parameters = model.named_parameters(remove_duplicate=False)
            dtypes = {name: model.dtype_of(name, dtype) for name, _ in parameters}
            sliced = partial(slices.of, dtypes)
        self._table, self.shards = divide(model, world, sliced)
        self.local_names = names_of_process(self._stages, world)

    def check(self, slots: Mapping[str, Slot]) -> None:
        """Refuse quantisation formats whose blocks would be cut.

        Raises:
            InputError: there is one.
        """
        check_divided(slots, self.shards, self._table, self.world.degrees)

    def finish(self, model: ModelCore) -> None:
        """Install the communication hooks, once the weights are in place."""
        connect(model, self._table, self.world)
        model.world = self.world
        if self._stages is not None:
            leave_out(model, self._stages, self.world)
