"""The layout of parameters over processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from quintet.training.optimizers.clipping import norm

T = TypeVar("T")


class Layout(Protocol):
    """The layout of parameters over processes; its methods are collective calls."""

    @property
    def rounds(self) -> bool:
        """Whether float32 parameters become bfloat16 by themselves where they are computed with."""
        ...

    @property
    def whole_model(self) -> nn.Module | None:
        """Whether this process has only some of the layers."""
        ...

    def run(self, call: Callable[[], T]) -> T:
        """Return the result of a call that runs the model."""
        ...

    def learn(self, parts: Sequence[Callable[[], Tensor | None]], sizes: Sequence[int]) -> None:
        """Accumulate the gradients of a step's parts.

        Args:
            parts: each runs the model over a part, and returns what it adds to what is minimised;
                None if other processes alone find that.
            sizes: how many tokens, with padding, each has.
        """
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter or its gradient, without a copy."""
        ...

    @property
    def awaited(self) -> frozenset[str]:
        """The parameters here of which `add_up` wants a gradient, and be it zero."""
        ...

    def add_up(self, gradients: Mapping[str, Tensor]) -> None:
        """Make of gradients that are parts of a sum the sum, in place, by their parameters."""
        ...

    def norms(self, groups: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return the norm of each group of tensors, by their parameters, over all processes."""
        ...

    def apart(self, name: str, tensor: Tensor) -> bool:
        """Return whether any one matrix of a parameter lies in several processes."""
        ...

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor that lies as a parameter does."""
        ...

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's part of a whole tensor."""
        ...

    def counts(self, name: str) -> bool:
        """Return whether a tensor that is here counts here: of layers, others may have it too."""
        ...

    def elsewhere(self, name: str) -> bool:
        """Return whether only other processes have a tensor."""
        ...

    def collected(self, own: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield named tensors, and in the first process behind them those of other layers."""
        ...


class LocalLayout:
    """All of it in this process."""

    rounds = False
    whole_model = None

    def run(self, call: Callable[[], T]) -> T:
        """Return the result of a call that runs the model."""
        return call()

    def learn(self, parts: Sequence[Callable[[], Tensor | None]], sizes: Sequence[int]) -> None:
        """Accumulate the gradients of a step's parts, one after the other."""
        for part in parts:
            if (loss := part()) is not None:
                loss.backward()  # type: ignore[no-untyped-call]

    def local(self, tensor: Tensor) -> Tensor:
        """Return all of it."""
        return tensor

    @property
    def awaited(self) -> frozenset[str]:
        """None: nobody waits."""
        return frozenset()

    def add_up(self, gradients: Mapping[str, Tensor]) -> None:
        """Leave whole gradients as they are."""

    def norms(self, groups: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return the norm of each group of tensors."""
        return [norm(group.values()) for group in groups]

    def apart(self, name: str, tensor: Tensor) -> bool:
        """Return False."""
        return False

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def counts(self, name: str) -> bool:
        """Return True."""
        return True

    def elsewhere(self, name: str) -> bool:
        """Return False."""
        return False

    def collected(self, own: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors."""
        yield from own


LOCAL = LocalLayout()
