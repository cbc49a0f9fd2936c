"""Tables that map stacked experts of a model to separate tensors on disk, and back.

Module names equal checkpoint names, so that most tensors need no table. Experts do: a model holds
the matrices of all experts of a layer in one tensor, a checkpoint holds one of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quintet.checkpoint.header import MAX_TENSORS, TensorInfo

Shape = tuple[int, ...]
STACK = ".switch_mlp."


@dataclass(frozen=True, slots=True)
class StackExperts:
    """A stack (E, rows, ...) whose slice e concatenates the tensors of expert e.

    It is read in both directions: a tensor of the model is cut into views to be saved, and
    filled part by part, in whatever order they come, to be loaded.

    Attributes:
        stacked: how the name in the model ends, for example "experts.gate_up_proj".
        parts: how the names on disk end, "{}" standing for the expert; parts share the rows
            equally, in this order.
    """

    stacked: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StackPiece:
    """A tensor on disk that fills a model's tensor, or one expert's rows of it."""

    name: str
    shape: Shape
    place: tuple[int, slice] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the model's tensor that this piece fills."""
        return tensor if self.place is None else tensor[self.place]


def pieces(name: str, shape: Shape, stacks: Sequence[StackExperts]) -> list[StackPiece]:
    """List the tensors on disk that fill a tensor of the model."""
    stack = _stack_of(name, stacks)
    if stack is None:
        return [StackPiece(name, shape)]
    prefix = name.removesuffix(stack.stacked)
    rows, rest = divmod(shape[1], len(stack.parts))
    assert not rest, f"{name} {shape} is not {len(stack.parts)} parts of equal height"
    return [
        StackPiece(
            prefix + part.format(expert),
            (rows, *shape[2:]),
            (expert, slice(index * rows, (index + 1) * rows)),
        )
        for expert in range(shape[0])
        for index, part in enumerate(stack.parts)
    ]


def count_pieces(name: str, shape: Shape, stacks: Sequence[StackExperts]) -> int:
    """Count the tensors on disk that fill a tensor of the model, without listing them."""
    stack = _stack_of(name, stacks)
    return 1 if stack is None else shape[0] * len(stack.parts)


def taken_apart(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Split the stacked experts of MLX's files into one entry per expert.

    There, `mlp.switch_mlp.up_proj.weight` (E, ...) is `mlp.experts.0.up_proj.weight` and so on.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        before, stack, after = name.partition(STACK)
        count = info.shape[0] if info.shape else 0
        # Not more of them than there are bytes, nor than a checkpoint may have tensors.
        if not stack or info.nbytes < max(count, 1) or len(result) + count > MAX_TENSORS:
            result[name] = info
            continue
        for expert in range(count):
            own = f"{before}.experts.{expert}.{after}"
            start = info.start + expert * (info.nbytes // count)
            result[own] = replace(info, name=own, shape=info.shape[1:], start=start)
    return result


def _stack_of(name: str, stacks: Sequence[StackExperts]) -> StackExperts | None:
    for stack in stacks:
        if name == stack.stacked or name.endswith("." + stack.stacked):
            return stack
    return None


def split_tensors(
    tensors: Mapping[str, Tensor], stacks: Sequence[StackExperts]
) -> Iterator[tuple[str, Tensor]]:
    """Name a model's tensors as on disk; experts become views."""
    for name, tensor in tensors.items():
        for piece in pieces(name, tuple(tensor.shape), stacks):
            yield piece.name, piece.of(tensor)
