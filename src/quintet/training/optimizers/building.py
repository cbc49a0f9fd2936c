"""The optimizers of a model's weights, as one."""

import math
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from quintet.modeling.base import PreTrainedModel
from quintet.training.optimizers.clipping import clip, norm
from quintet.training.optimizers.groups import Group, grouped, table
from quintet.training.optimizers.layout import LOCAL, Layout
from quintet.training.optimizers.masters import Masters
from quintet.training.optimizers.muon import Muon
from quintet.training.optimizers.roles import Member
from quintet.training.optimizers.settings import OptimizerSettings
from quintet.training.optimizers.spread_muon import SpreadMuon
from quintet.training.optimizers.state import copy_into, materialised
from quintet.training.progress import Progress
from quintet.training.schedules import schedule_of


class Optimizers:
    """All optimisers of a model, stepped together."""

    def __init__(
        self,
        groups: list[Group],
        masters: Masters,
        settings: OptimizerSettings,
        layout: Layout = LOCAL,
    ) -> None:
        """Take the groups, what is stepped in their place, the settings, and where that lies."""
        self.groups = groups
        self.settings = settings
        self.layout = layout
        self._schedule = schedule_of(settings.schedule)
        self._masters = masters
        self._optimizers: list[torch.optim.Optimizer] = []
        self._tables: list[tuple[Group, dict[str, Any]]] = []
        for kind in ("muon", "adamw"):
            own = [group for group in groups if group.kind == kind and group.members]
            if own:
                self._add(own)
        self._norms: dict[str, Tensor] = {}

    def _add(self, groups: list[Group]) -> None:
        tables = [
            {
                "params": [self._masters[member.name] for member in group.members],
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
                **({"matrices": group.matrices} if group.kind == "muon" else {}),
            }
            for group in groups
        ]
        optimizer: torch.optim.Optimizer
        if groups[0].kind == "muon":
            optimizer = self._muon(tables, [m for group in groups for m in group.members])
        else:
            optimizer = torch.optim.AdamW(
                tables, betas=self.settings.betas, eps=self.settings.eps, fused=True
            )
        materialised(optimizer)
        self._optimizers.append(optimizer)
        self._tables += zip(groups, optimizer.param_groups, strict=True)

    def _muon(self, tables: list[dict[str, Any]], members: list[Member]) -> Muon:
        momentum, nesterov = self.settings.momentum, self.settings.nesterov
        if self.layout is LOCAL:
            return Muon(tables, momentum=momentum, nesterov=nesterov)
        names = {self._masters[member.name]: member.name for member in members}
        return SpreadMuon(tables, names, self.layout, momentum=momentum, nesterov=nesterov)

    def step(self, at: Progress) -> None:
        """Move every weight that has a gradient, at the learning rates of this step.

        A parameter without a gradient stays as it is, its state too.
        """
        share = self._schedule.at(at)
        for group, parameters in self._tables:
            parameters["lr"] = group.learning_rate * share
        for optimizer in self._optimizers:
            optimizer.step()
        self._masters.round()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._masters.zero_grad()

    def clip(self, max_norm: float | None = None) -> Tensor:
        """Scale the gradient down to a norm, the settings' if None; return the norm it had.

        What several processes have of it is added up first, so that it is called once a step. A
        norm that is not finite says that the step is to be left out; nothing is scaled then.
        """
        most = self.settings.max_norm if max_norm is None else max_norm
        self._masters.assign_gradients()
        gradients = [self._gradients(group) for group in self.groups]
        self.layout.add_up({name: x for group in gradients for name, x in group.items()})
        found = self.layout.norms(gradients)
        self._norms = {g.name: value for g, value in zip(self.groups, found, strict=True)}
        whole = norm(self._norms.values())
        if most < math.inf:
            clip((x for group in gradients for x in group.values()), whole, most)
        return whole

    def gradient(self, name: str) -> Tensor | None:
        """Return the gradient a parameter has by now, in float32; None without one."""
        return self._masters[name].grad

    def _gradients(self, group: Group) -> dict[str, Tensor]:
        found = {member.name: self.gradient(member.name) for member in group.members}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def learning_rates(self, at: Progress) -> dict[str, float]:
        """Return the learning rate of each group in the step that begins here."""
        share = self._schedule.at(at)
        return {group.name: group.learning_rate * share for group in self.groups}

    def scalars(self) -> dict[str, float]:
        """Return the norms of the groups' gradients as the last `clip` saw them."""
        return {f"grad_norm {name}": value.item() for name, value in self._norms.items()}

    def table(self) -> str:
        """Write who moves what, one group a line."""
        return table(self.groups)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by flat names, as far as it is here: the tensors themselves."""
        return {name: tensor for name, _, tensor in self._state()}

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole state in all processes; all have to read it to its end.

        Where these have other layers, the first alone gets all of it.
        """
        layout = self.layout
        return layout.collected(
            (name, layout.whole(member, tensor) if tensor.ndim else tensor)
            for name, member, tensor in self._state()
            if layout.counts(member)
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a whole state, to the bit, and set the weights from it.

        Raises:
            CheckpointError: something is missing, extra, or of another shape or dtype; nothing
                was changed then.
        """
        # What lies with other layers is theirs to take over.
        tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if not self.layout.elsewhere(name.rpartition(".")[0])
        }
        members = {name: member for name, member, tensor in self._state() if tensor.ndim}
        parts = {
            n: self.layout.part(members[n], x) if n in members else x for n, x in tensors.items()
        }
        copy_into(self.tensors(), parts)
        self._masters.round()

    def _state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield each tensor with its name and that of its parameter."""
        for member in self._members():
            weight = self._masters[member.name]
            if member.name in self._masters.separate:
                yield f"{member.name}.master", member.name, weight.detach()
            for optimizer in self._optimizers:
                for key, value in optimizer.state.get(weight, {}).items():
                    yield f"{member.name}.{key}", member.name, value

    def _members(self) -> Iterator[Member]:
        return (member for group in self.groups for member in group.members)

    def close(self) -> None:
        """Give the gradients back to the parameters, and undo all changes."""
        self._masters.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def build_optimizers(
    model: PreTrainedModel, settings: OptimizerSettings, layout: Layout = LOCAL
) -> Optimizers:
    """Build the optimizers of a model from the settings, wherever its weights lie.

    With `precision="bfloat16"` the model's weights are rounded to it here, and what they were is
    kept beside them in float32. Build it before the first forward.

    Raises:
        ConfigError: the settings do not go together with this model.
    """
    groups = grouped(model, settings, layout.whole_model)
    masters = Masters(model, groups, settings.precision, layout)
    return Optimizers(groups, masters, settings, layout)
