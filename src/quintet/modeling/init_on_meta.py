"""Models on the meta device: names and shapes without memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ConfigError, QuintetError
from quintet.modeling.core import ModelCore

Model = TypeVar("Model", bound=ModelCore)


class _Undrawn(TorchFunctionMode):
    """Skips weight initialisation, which on meta still imports a compiler."""

    DRAWS: tuple[Any, ...] = (
        *(torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_),
        *(nn.init.kaiming_uniform_, nn.init.trunc_normal_, nn.init.xavier_uniform_),
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), _Undrawn():
        yield


def init_on_meta(cls: type[Model], config: PreTrainedConfig) -> Model:
    """Build a model on the meta device.

    Raises:
        ConfigError: a parameter would have more bytes than can be counted.
    """
    try:
        with _on_meta():
            return cls(config)
    except QuintetError:
        raise
    except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
        # torch has many ways to say that a shape, or the product of its sides, is beyond 64 bits.
        large = [key for key, value in vars(config).items() if _is_immense(value)]
        if not large:
            raise
        raise ConfigError(
            f"{cls.__name__}: {', '.join(large)} of its config make tensors that no machine can "
            "have"
        ) from error


def _is_immense(value: object) -> bool:
    return isinstance(value, int) and value >= 2**24
