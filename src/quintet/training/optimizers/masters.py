"""Master weights in float32."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quintet.errors import ConfigError
from quintet.modeling.base import PreTrainedModel
from quintet.training.optimizers.groups import Group
from quintet.training.optimizers.layout import Layout
from quintet.training.optimizers.settings import Precision


class Masters:
    """The weights as an optimiser sees them, in float32.

    A weight of fewer bits has a master: steps are taken on it, and the weight is its rounded copy.
    The weight's gradients go to the master's as soon as they are there, and add up in float32. Of a
    weight that is divided among processes, steps are taken on what this process has.

    Attributes:
        separate: the names of those whose float32 is more than the model has when it computes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Iterable[Group],
        precision: Precision,
        layout: Layout,
    ) -> None:
        """Round the model if the precision asks for it, and keep the original as masters.

        Raises:
            ConfigError: the model has weights of fewer bits than the precision.
        """
        members = [member for group in groups for member in group.members]
        trained = {member.name: member.parameter for member in members}
        before: dict[str, Tensor] = {}
        rounded = precision == "bfloat16" and not layout.rounds
        if rounded:
            before = {name: p.detach().to(torch.float32, copy=True) for name, p in trained.items()}
            named = model.named_parameters()
            adapters = {p: p.data for name, p in named if ".adapters." in f".{name}"}
            model.to(torch.bfloat16)
            # Adapters are float32 on any model.
            for parameter, numbers in adapters.items():
                parameter.data = numbers
        self._weights: dict[str, Tensor] = {n: layout.local(p) for n, p in trained.items()}
        self._layout = layout
        self._parts = [
            (parameter, self._weights[name])
            for name, parameter in trained.items()
            if self._weights[name] is not parameter
        ]
        # What is rounded when it is gathered is the master itself.
        gathered = precision == "bfloat16" and layout.rounds
        self.separate = {n for n, p in trained.items() if gathered and self._weights[n] is not p}
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        for name, parameter in trained.items():
            if parameter.dtype == torch.float32:
                continue
            if name not in before:
                raise ConfigError(
                    f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and "
                    f"precision={precision!r} trains weights in float32; load the model with "
                    'dtype="float32", or choose precision="bfloat16"'
                )
            master = self._weights[name] = before[name].requires_grad_()
            self.separate.add(name)
            self._rounded.append((parameter, master))
            hand_over = partial(_hand_over, master)
            hook = parameter.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor that is stepped in place of the parameter of that name."""
        return self._weights[name]

    def assign_gradients(self) -> None:
        """Give the stepped tensors the gradients of their parameters."""
        for parameter, part in self._parts:
            part.grad = None if parameter.grad is None else self._layout.local(parameter.grad)
        for name in self._layout.awaited & self._weights.keys():
            weight = self._weights[name]
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    @torch.no_grad()
    def round(self) -> None:
        """Make the weights the rounded copies of their masters."""
        for parameter, master in self._rounded:
            parameter.copy_(master)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self._weights.values():
            weight.grad = None
        for parameter, _ in self._parts:
            parameter.grad = None

    def close(self) -> None:
        """Leave the gradients with the weights from now on."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def _hand_over(master: Tensor, parameter: Tensor) -> None:
    if parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.to(torch.float32)
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
