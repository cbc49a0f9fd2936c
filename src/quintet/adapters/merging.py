"""Merging of adapters into weights, and exact unmerging.

What is taken out are not the changes: the weights that were there are put back, to the last bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from quintet.adapters.bases import with_tensors
from quintet.adapters.forwards import ALL, Active, Forward, adapted_modules, forward_for
from quintet.errors import UnsupportedBackendError, UnsupportedModelError
from quintet.layers.adapted import Places
from quintet.quantization import Quantized


@dataclass
class Merge:
    """The tensors that a merge replaced.

    Attributes:
        active: the adapters that are in the weights.
        tensors: the parameters that were there, by module and name.
        modules: the modules that were there, by what they were in and their name; quantised ones.
    """

    active: tuple[Active, ...]
    tensors: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def undo(self) -> None:
        """Restore the replaced tensors."""
        for module, name, parameter in self.tensors:
            module._parameters[name] = parameter
        for parent, name, module in self.modules:
            parent._modules[name] = module


def merge(
    model: nn.Module,
    places: Places,
    active: Sequence[Active],
    dtype: torch.dtype,
) -> Merge:
    """Merge adapters into a model's weights, all or none.

    Args:
        model: the model.
        places: where forwards of it are.
        active: which are added.
        dtype: of the numbers that quantised matrices become.

    Raises:
        UnsupportedModelError: a module is used by several layers, with an adapter for each.
        UnsupportedBackendError: matrices are not finite with the adapters.
    """
    done = Merge(tuple(active))
    parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                parents.setdefault(child, []).append((parent, name))
    planned: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for module in adapted_modules(model):
        changed = _changed(module, places, active)
        if changed:
            planned.append((module, changed))
    for module, changed in planned:
        if isinstance(module, Quantized) and not changed.keys().isdisjoint(module.matrices):
            plain = _plain(module, changed, dtype)
            for parent, name in parents[module]:
                done.modules.append((parent, name, module))
                parent._modules[name] = plain
            continue
        for name, tensor in changed.items():
            own = module._parameters.get(name)
            done.tensors.append((module, name, own))
            kept_dtype = dtype if own is None else own.dtype
            trains = own is not None and own.requires_grad
            module._parameters[name] = nn.Parameter(tensor.to(kept_dtype), requires_grad=trains)
    return done


def _changed(module: nn.Module, places: Places, active: Sequence[Active]) -> dict[str, Tensor]:
    """Return a module's tensors after the changes, in float32."""
    collection = cast("nn.ModuleDict", module.adapters)
    uses = {
        use
        for one in active
        if one.name in collection
        for use in cast("nn.ModuleDict", collection[one.name])
    }
    if uses - {ALL}:
        raise UnsupportedModelError(
            f"a {type(module).__name__} is used by the layers {', '.join(sorted(uses))}, and the "
            "adapter changes it for each of them in another way: one weight cannot be all of "
            "these. Use the adapter without merging it"
        )
    found = vars(module).get("forward")
    forward = found if isinstance(found, Forward) else forward_for(module, places)
    with torch.no_grad():
        changed = forward.changed(forward.in_use(active))
    for name, tensor in changed.items():
        if not bool(tensor.isfinite().all()):
            raise UnsupportedBackendError(
                f"with {', '.join(one.name for one in active)} the {name} of a "
                f"{type(module).__name__} is not finite; the adapter is damaged"
            )
    return changed


def _plain(module: Quantized, changed: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return an unquantised copy of a quantised module."""
    # What an adapter leaves alone of a stack of experts is decoded with the rest.
    whole = {name: module.decoded(name, torch.float32) for name in module.matrices} | dict(changed)
    tensors = {n: nn.Parameter(t.to(dtype), requires_grad=False) for n, t in whole.items()}
    plain = with_tensors(module, tensors)
    plain._modules["adapters"] = module.adapters  # type: ignore[assignment]
    return plain
