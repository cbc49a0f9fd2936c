"""Models on several devices: hooks move activations to the weights.

Single-device code stays as it is. Hooks bring what a part is given to where it is, and bring back
what the rest of the model meets elsewhere.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from quintet.cache import Segment
from quintet.layers.context import ForwardContext
from quintet.modeling.core import ModelCore
from quintet.modeling.placement import ModelPart, Placement
from quintet.ops.masks import AttentionMask
from quintet.triton.texts import Texts


def dispatch_model(model: ModelCore, placement: Placement, parts: Sequence[ModelPart]) -> None:
    """Move tensors that the checkpoint did not fill, and hook the model to run on its devices."""
    if not placement.several:
        model.to(placement.device_of(""))
        return
    for part in parts:
        device = placement.device_of(part.path)
        for module in model.get_submodule(part.path).modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != device and name in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(device))
    _hook(model, placement, parts)


def _hook(model: ModelCore, placement: Placement, parts: Sequence[ModelPart]) -> None:
    """Hook a model on several devices: inputs and outputs stay on the first.

    What several layers share is where the first of them is; the others send to it and get back.
    """
    home = model.get_input_embeddings().weight.device
    where: dict[nn.Module, torch.device] = {}
    tied = model.tied_names()
    for part in parts:
        # A tied head is where the weight is that it shares.
        origin = tied.get(f"{part.path}.weight", part.path)
        device, module = placement.device_of(origin), model.get_submodule(part.path)
        module.register_forward_pre_hook(_Bring(device), with_kwargs=True)
        for guest in _guests(module, device, where):
            visits = _Visits(where[guest])
            guest.register_forward_pre_hook(visits.arrive, with_kwargs=True)
            guest.register_forward_hook(visits.leave, always_call=True)
        where |= {inner: device for inner in module.modules() if inner not in where}
        if model.base_model is not model and not part.path.startswith(model.base_model_prefix):
            module.register_forward_hook(_Send(home))


def _guests(
    module: nn.Module, device: torch.device, where: Mapping[nn.Module, torch.device]
) -> Iterator[nn.Module]:
    """Yield modules a part shares with an earlier part on another device."""
    for child in module.children():
        if where.get(child, device) == device:
            yield from _guests(child, device, where)
        elif not child._forward_pre_hooks:
            yield child


def moved(value: Any, device: torch.device) -> Any:
    """Move all tensors in a value to a device; caches stay."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, ForwardContext | Segment | AttentionMask | Texts):
        given = (field.name for field in dataclasses.fields(value) if field.init)
        fields = {name: moved(getattr(value, name), device) for name in given}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


# Hooks are objects, not closures: a model is copied and pickled with them. What they keep of a
# forward is with its step, or with the thread that runs it: others may run the same model.


@dataclass(frozen=True, slots=True)
class _Bring:
    """A hook that moves arguments to a part's device."""

    device: torch.device

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(_brought(arg, self.device) for arg in args),
            {key: _brought(arg, self.device) for key, arg in kwargs.items()},
        )


@dataclass(frozen=True, slots=True)
class _Send:
    """A hook that moves a part's output to a device."""

    device: torch.device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return moved(output, self.device)


@dataclass(slots=True)
class _Visits:
    """Two hooks of a shared part: arguments move to it, the output moves back.

    Attributes:
        device: where the part is.
        callers: from where each thread is calling it.
    """

    device: torch.device
    callers: dict[int, torch.device] = field(default_factory=dict)

    def arrive(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move the arguments to the part, and remember their device."""
        given = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        self.callers[get_ident()] = next(given).device
        return _Bring(self.device)(module, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Move the output back, and forget the device, also after a failure."""
        return moved(output, self.callers.pop(get_ident(), self.device))


def _brought(value: Any, device: torch.device) -> Any:
    """Return an argument on a device; a shared context is moved once per device."""
    if not isinstance(value, ForwardContext):
        return moved(value, device)
    if value.embeds.device == device:
        return value
    if device not in value.elsewhere:
        value.elsewhere[device] = moved(value, device)
    return value.elsewhere[device]
