"""A model that is also an instance of Transformers' `PreTrainedModel`, for tools that ask.

`Trainer` writes a checkpoint that can be loaded, and PEFT leaves the output layer out of
"all-linear", for what is an instance of that class alone. Everything this library defines goes
before what Transformers does.
"""

import functools
from typing import Any, TypeVar

from torch import nn

from quintet.errors import MissingDependencyError
from quintet.interop.adaptable import as_linear
from quintet.interop.caches import continuing_caches, taking_caches
from quintet.modeling.base import PreTrainedModel
from quintet.quantization import Quantized

Model = TypeVar("Model", bound=PreTrainedModel)
# Bits of a weight: what is less is called 4, the rest 8.
FEW = 7


def as_transformers(model: Model) -> Model:
    """Make a model an instance of `transformers.PreTrainedModel`, too, and return it.

    It is the same object with the same weights and methods; its class is one derived from the
    one it had. A second call changes nothing. Linear maps in fewer bits become `nn.Linear`s, too,
    so that adapters find them, and the model says as those of Transformers do that it has such
    (`is_loaded_in_4bit`, `is_loaded_in_8bit`).

    Raises:
        MissingDependencyError: Transformers is not installed.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind: Any = type(module)
            module.__class__ = _bridged(kind)
        as_linear(module)
    bits = _bits(model)
    if bits is not None:
        marked: Any = model
        marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = bits < FEW, bits >= FEW
    return model


def _bits(model: nn.Module) -> float | None:
    """Return the bits per weight of the quantised maps, or None."""
    quantized = [module for module in model.modules() if isinstance(module, Quantized)]
    count = sum(module.weight_count for module in quantized)
    size = sum(buffer.nbytes for module in quantized for buffer in module.buffers())
    return 8 * size / count if count else None


@functools.cache
def _bridged(cls: Any) -> Any:
    try:
        from transformers import PreTrainedModel as TransformersModel
    except ImportError as error:
        raise MissingDependencyError(
            "quintet.interop needs Transformers; install it with pip install transformers"
        ) from error
    if issubclass(cls, TransformersModel):
        return cls
    body = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "config_class": cls.config_class,
        "__reduce_ex__": _reduced,
        "forward": taking_caches(cls.forward),
    }
    if cls.can_generate():
        body["generate"] = continuing_caches(cls.generate)
    # Checkpoints and messages name the class as if there was no other.
    return type(cls.__name__, (cls, TransformersModel), body)


def _reduced(model: PreTrainedModel, protocol: int) -> tuple[Any, ...]:
    return _empty, (type(model).__mro__[1],), model.__getstate__()  # type: ignore[no-untyped-call]


def _empty(cls: Any) -> Any:
    bridged = _bridged(cls)
    return bridged.__new__(bridged)
