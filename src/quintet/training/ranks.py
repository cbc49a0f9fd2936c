"""The processes that train together: their batches, sums and decisions."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quintet import errors
from quintet.errors import QuintetError
from quintet.parallel.layout import BATCHES, DATA, add_up
from quintet.parallel.world import DENSE, Degrees, World

T = TypeVar("T")

# Along these axes processes find parts of what is added up: in other tokens, or in other layers.
FOUND = ("pp", *DATA)


class Ranks(Protocol):
    """The processes of a training; all calls are collective."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    @property
    def degrees(self) -> Degrees:
        """The degrees of the division."""
        ...

    @property
    def axes(self) -> str:
        """The axes of the division."""
        ...

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        ...

    @property
    def share(self) -> tuple[int, int]:
        """This process's share of a step's batches, and the number of shares."""
        ...

    def counted(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of counts over batches, each batch once."""
        ...

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of processes' results for their parts of batches."""
        ...

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors that processes find in their parts of batches."""
        ...

    def of_layers(self, tensor: Tensor) -> Tensor:
        """Return the sum of processes' results in their layers, of the same tokens."""
        ...

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Return the maximum of each number over the processes."""
        ...

    def lead(self, act: Callable[[], T]) -> T:
        """Return the first process's result of an act, a plain value as in JSON.

        Raises:
            QuintetError: what it raised there.
        """
        ...

    def in_turn(self, act: Callable[[], T]) -> T:
        """Run an act that leaves something behind in the first process, and then in the others.

        Raises:
            QuintetError: what it raised in the first, everywhere.
        """
        ...

    def collected(self, value: Any) -> list[Any]:
        """Return the values of all processes, as JSON has them."""
        ...


class Alone:
    """One process."""

    rank, size, axes, degrees = 0, 1, "1", Degrees()
    first = True
    share = (0, 1)

    def counted(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the counts."""
        return dict(counts)

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums."""
        return dict(sums)

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def of_layers(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Return the numbers."""
        return list(numbers)

    def lead(self, act: Callable[[], T]) -> T:
        """Return the result of the act."""
        return act()

    def in_turn(self, act: Callable[[], T]) -> T:
        """Return the result of the act."""
        return act()

    def collected(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


class Several:
    """The processes of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rank, self.size = world.rank, world.degrees.size
        self.first = world.rank == 0
        coordinates = world.coordinates
        self.degrees = degrees = world.degrees
        divided = {axis: degrees.of(axis) for axis in (*DENSE, "ep")}
        self.axes = " · ".join(f"{axis}={n}" for axis, n in divided.items() if n > 1)
        self.share = (
            coordinates["dp"] * degrees.fsdp + coordinates["fsdp"],
            degrees.dp * degrees.fsdp,
        )

    def counted(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of counts over batches, each batch once."""
        return self._sums(counts, BATCHES)

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of processes' results for their parts of batches."""
        return self._sums(sums, FOUND)

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors that processes find in their parts of batches."""
        return self._sum(tensor, FOUND)

    def of_layers(self, tensor: Tensor) -> Tensor:
        """Return the sum of processes' results in their layers, of the same tokens."""
        return self._sum(tensor, ("pp",))

    def _sums(self, numbers: Mapping[str, float], axes: Sequence[str]) -> dict[str, float]:
        # Counts of tokens are exact in these numbers up to 2^53.
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu")
        return dict(zip(numbers, self._sum(values, axes).tolist(), strict=True))

    def _sum(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        copy = tensor.to(self.world.device, copy=True)
        return add_up(copy, self.world, axes).to(tensor.device)

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Return the maximum of each number over the processes."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.world.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        found: list[float] = values.tolist()
        return found

    def lead(self, act: Callable[[], T]) -> T:
        """Return the first process's result of an act, a plain value as in JSON."""
        result: Any = None
        failed: QuintetError | None = None
        if self.first:
            try:
                result = act()
            except QuintetError as error:
                failed = error
        message = self._broadcast({"value": result} if failed is None else _written(failed))
        if failed is not None:
            raise failed
        if "error" in message:
            raise _read(message)
        return message["value"]  # type: ignore[no-any-return]

    def in_turn(self, act: Callable[[], T]) -> T:
        """Run an act that leaves something behind in the first process, and then in the others."""
        results: list[T] = []
        # What is told of it is that it is done.
        self.lead(lambda: results.append(act()))
        return results[0] if results else act()

    def collected(self, value: Any) -> list[Any]:
        """Return the values of all processes, as JSON has them."""
        own = _bytes(value).to(self.world.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=own.device) for _ in range(_size())]
        dist.all_gather(sizes, torch.tensor([len(own)], device=own.device, dtype=torch.long))
        most = max(int(size) for size in sizes)
        texts = [own.new_zeros(most) for _ in sizes]
        dist.all_gather(texts, torch.cat([own, own.new_zeros(most - len(own))]))
        return [_value(text[: int(n)]) for text, n in zip(texts, sizes, strict=True)]

    def _broadcast(self, value: Any) -> Any:
        """Return the value that the first process broadcasts."""
        own = _bytes(value).to(self.world.device)
        size = torch.tensor([len(own)], device=own.device, dtype=torch.long)
        dist.broadcast(size, 0)
        text = own if self.first else own.new_zeros(int(size))
        dist.broadcast(text, 0)
        return _value(text)


def _size() -> int:
    return dist.get_world_size()


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))


def _written(error: QuintetError) -> dict[str, str]:
    """Return an error as JSON has it: the nearest of its classes that all know."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__]
    return {"error": kinds[0] if kinds else "QuintetError", "text": str(error)}


def _read(message: Mapping[str, str]) -> QuintetError:
    kind = vars(errors)[message["error"]]
    error: QuintetError = kind.__new__(kind, message["text"])
    Exception.__init__(error, message["text"])
    return error
