"""Modules that kernels may bypass while nothing hooks or replaces their forward."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as hooks

from quintet.kernels.shared_buffer import SharedBuffer

Module = TypeVar("Module", bound=nn.Module)
WRITTEN_CALL = nn.Module._call_impl


class PlainModule(nn.Module):
    """A module whose forward a kernel may compute without calling it.

    Attributes:
        written_forward: the forward its class was written with, whatever it was replaced by since.
    """

    written_forward: ClassVar[Callable[..., Any]] = nn.Module.forward

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written_forward = cls.forward


class Idle:
    """A hook that does nothing unless gradients are recorded."""

    __slots__ = ()


class Summing(ABC):
    """A hook that only sums a module's output over processes."""

    __slots__ = ()

    @abstractmethod
    def shared_buffer(self) -> SharedBuffer | None:
        """Return the buffer kernels sum in, or None if processes exchange messages."""


def hooked(module: nn.Module) -> bool:
    """Return whether calling the module may do more than its class's own forward.

    That is so with a hook on it or on all modules, and where its forward or its call was replaced:
    its own, its class's, or that of all modules.
    """
    return "forward" in vars(module) or called_only(module)


def called_only(module: nn.Module) -> bool:
    """Return the module's forward, ignoring an `AdaptedForward`."""
    return _acts(module) or module._compiled_call_impl is not None or replaced(module)


def replaced(module: nn.Module) -> bool:
    """Return whether the class's call or forward was replaced."""
    kind = type(module)
    return bool(
        not issubclass(kind, PlainModule)
        or kind.forward is not kind.written_forward
        or kind.__call__ is not nn.Module._wrapped_call_impl
        or kind._call_impl is not WRITTEN_CALL
        or hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def sums_in(module: nn.Module) -> SharedBuffer | None:
    """Return the buffer a module's output is summed in, if that is its only hook."""
    acting = [hook for hook in _hooks(module) if not isinstance(hook, Idle)]
    alone = len(acting) == 1 and acting[0] in module._forward_hooks.values()
    if not alone or torch.is_grad_enabled() or "forward" in vars(module) or replaced(module):
        return None
    return acting[0].shared_buffer() if isinstance(acting[0], Summing) else None


def _hooks(module: nn.Module) -> list[object]:
    registries: tuple[Mapping[int, object], ...] = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return [hook for registry in registries for hook in registry.values()]


def _acts(module: nn.Module) -> bool:
    """Return whether any of the module's hooks acts now."""
    if not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    return torch.is_grad_enabled() or not all(isinstance(hook, Idle) for hook in _hooks(module))


def in_between(model: nn.Module) -> tuple[object, ...]:
    """Return all hooks (by id) and replaced forwards of a model, to see whether they changed."""
    modules = list(model.modules())
    on_each = [hook for m in modules for hook in (m._forward_hooks, m._forward_pre_hooks)]
    on_all = hooks._global_forward_hooks, hooks._global_forward_pre_hooks
    kinds = [kind for kind in dict.fromkeys(map(type, modules)) if issubclass(kind, PlainModule)]
    replaced = [kind.forward for kind in kinds if kind.forward is not kind.written_forward]
    return (*(tuple(hook) for hook in (*on_each, *on_all) if hook), *replaced)


def untouched(module: nn.Module | None, kind: type[Module]) -> Module | None:
    """Return the module if its class is exactly this one and nothing hooks it, else None."""
    return module if type(module) is kind and not hooked(module) else None
