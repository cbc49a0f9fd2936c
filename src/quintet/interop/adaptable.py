"""Linear maps in fewer bits as adapters want them: `nn.Linear`s with a `weight` of plain numbers.

PEFT puts its layers around what is an instance of that class, and reads the weight there, or, to
merge, writes it.
"""

import functools
import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quintet.quantization import QuantizedLinear


class HeldWeight(torch.Tensor):
    """The numbers (O, I) that a map's parts stand for: decoded to be read, rounded to be written.

    It takes no memory; every operation that reads it decodes the matrix, in float32. `data` is a
    copy of the numbers, and setting it writes them back.
    """

    module: QuantizedLinear

    @staticmethod
    def __new__(cls, module: QuantizedLinear) -> Self:
        """Make it of the weight of a module."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (module.out_features, module.in_features),
            dtype=torch.float32,
            device=module.buffer("weight").device,
        )

    def __init__(self, module: QuantizedLinear) -> None:
        super().__init__()
        self.module = module

    @property
    def data(self) -> Tensor:
        """The numbers; set, they are rounded to the format."""
        return self.module.decoded("weight", torch.float32)

    @data.setter
    def data(self, new: Tensor) -> None:
        warnings.warn(
            f"a weight is rounded to {self.module.format.name} again; text may change by that, "
            "and taking an adapter out again does not bring back the same numbers",
            stacklevel=2,
        )
        with torch.no_grad():
            parts = self.module.format.encode(new.detach().to(torch.float32))
            for suffix, part in parts.items():
                buffer = self.module.buffer("weight" + suffix)
                # In place: a tied embedding has the same tensors.
                buffer.copy_(part.view(buffer.shape))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the numbers."""
        args, kwargs = pytree.tree_map_only(HeldWeight, lambda x: x.data, (args, kwargs or {}))
        return func(*args, **kwargs)


def as_linear(module: nn.Module) -> None:
    """Make a linear map in fewer bits an instance of `nn.Linear`, too."""
    if isinstance(module, QuantizedLinear):
        kind: Any = type(module)
        module.__class__ = adaptable(kind)


@functools.cache
def adaptable(cls: Any) -> Any:
    """Return the class of such a map that is derived from `nn.Linear`, too."""
    if issubclass(cls, nn.Linear):
        return cls
    body = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "weight": property(HeldWeight),
        "together": vars(cls)["together"],
        "__reduce_ex__": _reduced,
    }
    return type(cls.__name__, (cls, nn.Linear), body)


def _reduced(module: QuantizedLinear, protocol: int) -> tuple[Any, ...]:
    return _empty, (type(module).__mro__[1],), module.__getstate__()  # type: ignore[no-untyped-call]


def _empty(cls: Any) -> Any:
    kind = adaptable(cls)
    return kind.__new__(kind)
