"""Modules that kernels may run uncalled, as long as nobody put anything in between."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn
from torch.nn.modules import module as hooks

__all__ = ["PlainModule", "called_only", "hooked", "in_between", "untouched"]

Module = TypeVar("Module", bound=nn.Module)
WRITTEN_CALL = nn.Module._call_impl


class PlainModule(nn.Module):
    """A module of which somebody else knows what its forward does.

    Attributes:
        written_forward: the forward its class was written with, whatever it was replaced by since.
    """

    written_forward: ClassVar[Callable[..., Any]] = nn.Module.forward

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written_forward = cls.forward


def hooked(module: nn.Module) -> bool:
    """Tell whether calling the module may do more than the forward its class was written with.

    That is so with a hook on it or on all modules, and where its forward or its call was replaced:
    its own, its class's, or that of all modules.
    """
    return "forward" in vars(module) or called_only(module)


def called_only(module: nn.Module) -> bool:
    """Tell the same but for a forward of the module's own, which says itself what it does."""
    kind = type(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or not issubclass(kind, PlainModule)
        or kind.forward is not kind.written_forward
        or kind.__call__ is not nn.Module._wrapped_call_impl
        or kind._call_impl is not WRITTEN_CALL
        or hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def in_between(model: nn.Module) -> tuple[object, ...]:
    """Return what stands between a model's modules, and is not looked at again once compiled.

    These are hooks, by their numbers, of which none is given twice, and replaced forwards of
    classes.
    """
    modules = list(model.modules())
    on_each = [held for m in modules for held in (m._forward_hooks, m._forward_pre_hooks)]
    on_all = hooks._global_forward_hooks, hooks._global_forward_pre_hooks
    kinds = [kind for kind in dict.fromkeys(map(type, modules)) if issubclass(kind, PlainModule)]
    replaced = [kind.forward for kind in kinds if kind.forward is not kind.written_forward]
    return (*(tuple(held) for held in (*on_each, *on_all) if held), *replaced)


def untouched(module: nn.Module | None, kind: type[Module]) -> Module | None:
    """Return a module that is of a class, not one derived from it, and nothing more; else None."""
    return module if type(module) is kind and not hooked(module) else None
