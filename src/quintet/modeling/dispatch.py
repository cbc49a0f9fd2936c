"""Parts of a model on several devices: activations follow the weights.

Single-device code stays as it is. Hooks bring what a part is given to where it is, and bring back
what the rest of the model meets elsewhere.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quintet.cache import Span
from quintet.layers.step import Step
from quintet.modeling.placement import Part, Placement
from quintet.ops.masks import Visibility

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel

__all__ = ["moved", "settle"]


def settle(model: "PreTrainedModel", placement: Placement, parts: Sequence[Part]) -> None:
    """Bring what was not in the checkpoint to where it belongs, and let the model run there."""
    if not placement.several:
        model.to(placement.device_of(""))
        return
    for part in parts:
        at = placement.device_of(part.path)
        for module in model.get_submodule(part.path).modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != at and name in module._non_persistent_buffers_set:
                    setattr(module, name, buffer.to(at))
    _hook(model, placement, parts)


def _hook(model: "PreTrainedModel", placement: Placement, parts: Sequence[Part]) -> None:
    """Let a model whose weights are on several devices run: inputs and outputs on the first.

    What several layers share is where the first of them is; the others send to it and get back.
    """
    home = model.get_input_embeddings().weight.device
    mover = _Mover()
    where: dict[nn.Module, torch.device] = {}
    tied = model.tied_names()
    for part in parts:
        # A tied head is where the weight is that it shares.
        origin = tied.get(f"{part.path}.weight", part.path)
        device, module = placement.device_of(origin), model.get_submodule(part.path)
        module.register_forward_pre_hook(mover.to(device), with_kwargs=True)
        for guest in _guests(module, device, where):
            guest.register_forward_pre_hook(mover.fetch(where[guest]), with_kwargs=True)
            guest.register_forward_hook(mover.send_back())
        where |= {inner: device for inner in module.modules() if inner not in where}
        if model.base_model is not model and not part.path.startswith(model.base_model_prefix):
            module.register_forward_hook(mover.home(home))
    model.base_model.register_forward_hook(mover.clear, always_call=True)


def _guests(
    module: nn.Module, device: torch.device, where: Mapping[nn.Module, torch.device]
) -> Iterator[nn.Module]:
    """Yield what a part shares with an earlier one that is elsewhere, if not hooked already."""
    for child in module.children():
        if where.get(child, device) == device:
            yield from _guests(child, device, where)
        elif not child._forward_pre_hooks:
            yield child


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with all tensors in it on a device; caches stay where they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, torch.device):
        return device
    if isinstance(value, Step | Span | Visibility):
        fields = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


class _Mover:
    """Moves what parts are given; the step that all layers share, once for each device."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, torch.device], tuple[Step, Step]] = {}
        self._callers: list[torch.device] = []

    def to(self, device: torch.device) -> Any:
        """Return a hook that brings a part's arguments to it."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (
                tuple(self._moved(arg, device) for arg in args),
                {key: self._moved(arg, device) for key, arg in kwargs.items()},
            )

        return hook

    def home(self, device: torch.device) -> Any:
        """Return a hook that brings what a part made to a device."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return moved(output, device)

        return hook

    def fetch(self, device: torch.device) -> Any:
        """Return a hook that brings a shared part's arguments to it, and notes where from."""
        hook = self.to(device)

        def noting(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self._callers.append(args[0].device)
            arguments: tuple[tuple[Any, ...], dict[str, Any]] = hook(module, args, kwargs)
            return arguments

        return noting

    def send_back(self) -> Any:
        """Return a hook that brings what a shared part made to where it was called from."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return moved(output, self._callers.pop())

        return hook

    def clear(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of the steps of a forward that is over."""
        self._steps.clear()
        self._callers.clear()

    def _moved(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Step) or value.embeds.device == device:
            return moved(value, device)
        key = (id(value), device)
        if key not in self._steps:
            self._steps[key] = (value, moved(value, device))
        return self._steps[key][1]
