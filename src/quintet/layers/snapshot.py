"""Detects cheaply whether modules, their weights or their hooks have changed."""

import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from quintet.layers.plain import replaced

look_up: Callable[[dict[str, Any], str], Any] = dict.get


class ModuleSnapshot:
    """The state of modules and everything below them at one moment.

    It tells of another module, parameter or buffer in a place, of other memory behind one, of
    hooks, of any attribute, and of another class or another forward in a class. What changes
    within the memory of a weight is the weight's own and no change here.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        # All loops over them are Python's own: there are hundreds, and they are asked every step.
        modules = list(dict.fromkeys(chain.from_iterable(map(_below, roots))))
        self._modules = modules
        self._kinds = list(map(type, modules))
        # What only holds others, or numbers, is never called.
        called = {kind: m for kind, m in zip(self._kinds, modules, strict=True) if _runs(kind)}
        self._one_of_each = list(called.values())
        self._attributes = list(map(vars, modules))
        self._values = list(chain.from_iterable(map(dict.values, self._attributes)))
        self._hooks = [
            hooks
            for m in modules
            for hooks in (
                m._forward_hooks,
                m._forward_pre_hooks,
                m._backward_hooks,
                m._backward_pre_hooks,
            )
        ]
        self._hooked = list(chain.from_iterable(map(dict.values, self._hooks)))
        places: list[tuple[dict[str, Any], str]] = [
            (registry, name)
            for m in modules
            for registry in (m._modules, m._parameters, m._buffers)
            for name in registry
        ]
        self._registries = [registry for registry, _ in places]
        self._names = [name for _, name in places]
        self._parts = list(map(look_up, self._registries, self._names))
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def holds(self) -> bool:
        """Return whether nothing has changed."""
        values = chain.from_iterable(map(dict.values, self._attributes))
        return (
            sum(map(len, self._hooks)) == len(self._hooked)
            and all(map(operator.is_, self._now_hooked(), self._hooked))
            and sum(map(len, self._attributes)) == len(self._values)
            and all(map(operator.is_, values, self._values))
            and all(map(operator.is_, map(look_up, self._registries, self._names), self._parts))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(type, self._modules)) == self._kinds
            and not any(map(replaced, self._one_of_each))
        )

    def _now_hooked(self) -> Iterator[object]:
        # Where there were none and none came, nothing is looked through.
        return chain.from_iterable(map(dict.values, self._hooks if self._hooked else ()))


def _runs(kind: type[nn.Module]) -> bool:
    return kind.forward is not nn.Module.forward


def _below(root: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all below it except adapters, which show in the module's forward."""
    yield root
    for name, child in root._modules.items():
        if child is not None and name != "adapters":
            yield from _below(child)
