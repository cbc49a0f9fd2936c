"""Sources of named tensors: files, memory, or either under other names."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from quintet.checkpoint.header import TensorInfo
from quintet.errors import CheckpointError, InputError, named


class Weights(Protocol):
    """Interface of named tensors that are read on demand."""

    @property
    def mapped(self) -> bool:
        """Whether all tensors are views of mapped files."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The entries of the tensors, by name."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor once, in the best order to read them."""

    def forget(self, name: str) -> None:
        """Release the pages of a tensor."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """The tensors of a state dict.

    Raises:
        InputError: something in it is not a tensor with a name.
    """

    state_dict: Mapping[str, Tensor]
    tensors: Mapping[str, TensorInfo] = field(init=False)
    mapped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.state_dict, Mapping):
            raise InputError(f"state_dict is a {named(self.state_dict)}; it maps names to tensors")
        for name, tensor in self.state_dict.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_meta:
                raise InputError(
                    f"state_dict has to map names to tensors with data, and {name!r} is a "
                    f"{'meta tensor' if isinstance(tensor, Tensor) else type(tensor).__name__}"
                )
        found = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path("state_dict"))
            for name, tensor in self.state_dict.items()
        }
        object.__setattr__(self, "tensors", found)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield copies, so that a model shares no weights with its source."""
        for name in names:
            yield name, self.state_dict[name].detach().clone()

    def forget(self, name: str) -> None:
        """Do nothing: the caller owns the memory."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """Tensors renamed by patterns, applied in order.

    Raises:
        InputError: a pattern is no regular expression.
        CheckpointError: two tensors would get one name.
    """

    weights: Weights
    patterns: Mapping[str, str]
    tensors: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, Mapping):
            raise InputError(
                f"key_mapping is a {named(self.patterns)}; it maps expressions to replacements"
            )
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.weights.tensors.items():
            new = self._renamed(name)
            if new in tensors:
                raise CheckpointError(
                    f"key_mapping gives {tensors[new].name!r} and {name!r} the one name {new!r}"
                )
            tensors[new] = info
        object.__setattr__(self, "tensors", tensors)

    @property
    def mapped(self) -> bool:
        """Whether tensors are views of files."""
        return self.weights.mapped

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.patterns.items():
            try:
                name = re.sub(pattern, replacement, name)
            except re.error as error:
                raise InputError(
                    f"key_mapping={{{pattern!r}: {replacement!r}}} is not a regular expression "
                    f"and its replacement ({error})"
                ) from None
        return name

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by their new names."""
        new_names = {self.tensors[name].name: name for name in names}
        for name, tensor in self.weights.read(new_names):
            yield new_names[name], tensor

    def forget(self, name: str) -> None:
        """Release the pages of a tensor."""
        self.weights.forget(self.tensors[name].name)
