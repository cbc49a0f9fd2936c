"""Stages that train: parts of a step pass them one after the other, and gradients come back.

The order in which a stage runs forwards and backwards is one of `torch.distributed.pipelining`.
Only states pass from stage to stage, and their gradients; each stage works out positions, masks and
texts anew from the ids, which all have. States go in the layout of the layers, (N, C), filled up to
the largest part, so that sizes are known before anything is sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.errors import InputError, shown
from quintet.parallel.stage import Stage
from quintet.parallel.stages import Stages, decoder_of, owners
from quintet.parallel.world import DENSE, World

Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


class Pipeline:
    """Trains a model whose layers are spread over processes.

    Args:
        model: this process's stages of it.
        stages: what all have.
        world: the processes.
        schedule: the order of forwards and backwards; 1F1B of fewer parts than stages is GPipe.

    Raises:
        InputError: there is no such schedule, or it is not of that many stages.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Stages,
        world: World,
        schedule: Schedule = "1F1B",
    ) -> None:
        if schedule not in get_args(Schedule):
            known = ", ".join(get_args(Schedule))
            raise InputError(f"schedule={shown(schedule)} is none of {known}")
        stage = vars(model)["stage"]
        assert isinstance(stage, Stage)
        self.model, self.stage, self.stages, self.world = model, stage, stages, world
        self.schedule = schedule
        self._index = world.coordinates["pp"]
        self._shared = _shared_groups(stages, world)
        self._built: tuple[tuple[int, int], Any] | None = None
        self._check()

    def run(self, forward: Callable[[int], Tensor | None], sizes: Sequence[int]) -> None:
        """Accumulate the gradients of a step's parts; `add_up` ends the step.

        Args:
            forward: runs the model over a part, by its number, and returns what the stage that
                runs adds to what is minimised, which is summed and not averaged: the last stage a
                loss of what it predicts, others one of what happens in their layers, or None.
            sizes: how many tokens, with padding, each part has at most; the same in all stages.

        What a part raises here is raised.
        """
        built = self._schedule(len(sizes), max(sizes))
        for one in built.stages:
            one.submod.run = forward
        numbers = torch.arange(len(sizes), dtype=torch.long, device="cpu")
        arguments = (numbers.float(),) if any(one.is_first for one in built.stages) else ()
        losses: list[Tensor] = []
        try:
            built.schedule.step(
                *arguments, number=numbers, target=numbers, losses=losses, return_outputs=False
            )
        except RuntimeError as error:
            # What failed in a part is told as it is, and not as the failure of a stage.
            if error.__cause__ is not None:
                raise error.__cause__ from None
            raise

    @property
    def shared(self) -> frozenset[str]:
        """The parameters here that other stages have, too, by their first names."""
        return frozenset(name for _, names in self._shared for name in names)

    @torch.no_grad()
    def add_up(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Add up, in place, the gradients of weights that several stages have; once a step.

        Args:
            gradients: by the names of parameters, where they are not with these; of what is in
                `shared` and learns, none may be missing.
        """
        gradients = self._gradients() if gradients is None else gradients
        for group, names in self._shared:
            found = [gradients[name] for name in names if name in gradients]
            for dtype in dict.fromkeys(x.dtype for x in found):
                # One call for all of them.
                parts = [x for x in found if x.dtype == dtype]
                total = torch.cat([x.flatten() for x in parts])
                dist.all_reduce(total, group=group)
                for x, sum_of in zip(
                    parts, torch.split(total, [x.numel() for x in parts]), strict=True
                ):
                    x.copy_(sum_of.view_as(x))

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name in self.shared:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found[name] = parameter.grad
        return found

    def counts(self, name: str) -> bool:
        """Return whether no process before has this tensor, so that each counts once."""
        return all(name not in names for names in self.stages.names[: self._index])

    def elsewhere(self, name: str) -> bool:
        """Return whether only other processes have a tensor."""
        names = self.stages.names
        return name not in names[self._index] and any(name in others for others in names)

    def _check(self) -> None:
        have, pp = self.stages.processes, self.world.degrees.pp
        runs_each, folded = layout_of(self.schedule, len(have) // pp)
        wanted = owners(pp, runs_each, folded=folded)
        # Where each process has one stage, the order does not matter to who passes what on.
        if have != wanted and not (runs_each == 1 and sorted(have) == sorted(wanted)):
            raise InputError(
                f"schedule={self.schedule!r} wants stages of processes in the order {wanted}, and "
                f"the model was cut for {have}; cut it by stages_of(model, pp, "
                "*layout_of(schedule))"
            )

    def _schedule(self, parts: int, most: int) -> "_Built":
        """Return the schedule of this many parts of at most `most` tokens."""
        if self._built is None or self._built[0] != (parts, most):
            self._built = ((parts, most), self._make(parts, most))
        found: _Built = self._built[1]
        return found

    def _make(self, parts: int, most: int) -> "_Built":
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import get_schedule_class

        owner = self.stage

        class Own(PipelineStage):
            """A stage whose layers are those that run, on the way back too, when recomputed."""

            def backward_one_chunk(self, *args: Any, **named: Any) -> None:
                owner.active = self.stage_index
                super().backward_one_chunk(*args, **named)

            def backward_weight_one_chunk(self, *args: Any, **named: Any) -> None:
                owner.active = self.stage_index
                super().backward_weight_one_chunk(*args, **named)

        count = len(self.stages.layers)
        decoder = decoder_of(self.model)
        width, dtype = decoder.config.hidden_size, owner.dtype or decoder.dtype
        states = torch.empty(most, width, dtype=dtype, device="meta", requires_grad=True)
        stages = [
            Own(
                _Part(self.model, owner, index, most),
                index,
                count,
                self.world.device,
                input_args=torch.empty(1, dtype=torch.float32, device="meta")
                if index == 0
                else states,
                output_args=torch.empty((), dtype=torch.float32, device="meta")
                if index == count - 1
                else states,
                group=self.world.groups["pp"],
            )
            for index in owner.indices
        ]
        for one in stages:
            one.stage_index_to_group_rank = dict(enumerate(self.stages.processes))
        few = self.schedule == "1F1B" and parts < count
        kind = get_schedule_class("GPipe" if few else self.schedule)
        several = self.schedule not in ("GPipe", "1F1B")
        try:
            schedule = kind(
                stages if several else stages[0], parts, loss_fn=_itself, scale_grads=False
            )
        except ValueError as error:
            raise InputError(
                f"schedule={self.schedule!r} of {parts} parts on {self.world.degrees.pp} "
                f"processes: {error}; cut a step into another number of parts"
            ) from None
        return _Built(schedule, stages)


def layout_of(schedule: Schedule, runs_each: int = 2) -> tuple[int, bool]:
    """Return the number of stages per process in a schedule, and whether they go back and forth.

    Args:
        schedule: the order of forwards and backwards.
        runs_each: how many, where the schedule leaves it open.
    """
    if schedule in ("GPipe", "1F1B"):
        return 1, False
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        return 2, True
    return max(runs_each, 2), False


@dataclass(frozen=True, slots=True)
class _Built:
    schedule: Any
    stages: list[Any]


class _Part(nn.Module):
    """The module that a stage of `torch.distributed.pipelining` runs."""

    run: Callable[[int], Tensor | None]

    def __init__(self, model: nn.Module, stage: Stage, index: int, most: int) -> None:
        super().__init__()
        self.model, self.stage, self.index, self.most = model, stage, index, most

    def forward(self, states: Tensor, number: Tensor) -> Tensor:
        """Map states (most, C) to those of the next stage, or in the last one to the objective."""
        stage = self.stage
        stage.active = self.index
        with stage.between(None if stage.first else states):
            loss = self.run(int(number))
            if stage.last:
                assert loss is not None
                # A part without labels has no graph, and sends back a gradient all the same.
                return loss if loss.requires_grad else loss + states.sum() * 0
            assert stage.outgoing is not None
            outgoing = stage.outgoing.flatten(0, 1)
        if loss is not None:
            outgoing = _Carrying.apply(outgoing, loss)  # type: ignore[no-untyped-call]
        return F.pad(outgoing, (0, 0, 0, self.most - len(outgoing)))


class _Carrying(torch.autograd.Function):
    """States that pass on, and a loss that is learned from when their gradients come back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.like)


def _itself(output: Tensor, target: Tensor) -> Tensor:
    return output


def _shared_groups(stages: Stages, world: World) -> list[tuple[dist.ProcessGroup, tuple[str, ...]]]:
    """Return this process's groups of those that have the same weights, and their names."""
    by_holders: dict[tuple[int, ...], list[str]] = {}
    for name, holders in stages.shared().items():
        by_holders.setdefault(holders, []).append(name)
    degrees = world.degrees
    found = []
    for holders, names in sorted(by_holders.items()):
        if len(holders) == degrees.pp:
            found.append((world.groups["pp"], tuple(names)))
            continue
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(degrees.size):
            at = degrees.coordinates(rank)
            if at["pp"] in holders:
                lines.setdefault(tuple(at[a] for a in DENSE if a != "pp"), []).append(rank)
        for members in lines.values():
            # Every process takes part in making every group.
            group = dist.new_group(members)
            if world.rank in members:
                found.append((group, tuple(names)))
    return found
