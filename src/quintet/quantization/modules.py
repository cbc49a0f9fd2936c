"""Quantised modules, whose weights do not learn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.errors import InputError
from quintet.kernels.linear import batch_invariant
from quintet.kernels.matrix import Matrix
from quintet.layers.linear import LinearMap
from quintet.layers.moe import Experts, ExpertStack
from quintet.ops.activations import Activation
from quintet.ops.moe import each_hit_expert, gated
from quintet.ops.one_pass import gated_mlp
from quintet.quantization.formats import Parts, Shape, TensorSpec, WeightFormat
from quintet.quantization.gradients import learns, product


class Quantized(nn.Module):
    """A module that holds encoded matrices as buffers.

    Attributes:
        formats: the format of each matrix.
        matrices: the shape of each, and of the stack it stands in: () for a matrix alone, (E, P)
            for E experts whose matrix is P on disk, which are on top of each other here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.formats: dict[str, WeightFormat] = {}
        self.matrices: dict[str, tuple[Shape, Shape]] = {}
        self._suffixes: dict[str, tuple[str, ...]] = {}
        self._heights: dict[str, dict[str, int]] = {}

    def hold(
        self,
        name: str,
        weight_format: WeightFormat,
        shape: Shape,
        stack: Shape = (),
        *,
        device: torch.device | None = None,
    ) -> None:
        """Register the buffers of a matrix, or a stack."""
        self.formats[name] = weight_format
        self.matrices[name] = (shape, stack)
        parts = weight_format.parts(shape)
        self._suffixes[name] = tuple(parts)
        self._heights[name] = {suffix: part.shape[0] for suffix, part in parts.items()}
        for suffix, part in parts.items():
            empty = torch.empty(_stacked(part, stack), dtype=part.dtype, device=device)
            self.register_buffer(name + suffix, empty)

    def parts(self, name: str, place: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Return views of a matrix's parts; `place` is its expert and index."""
        return self.view(name, {s: self.buffer(name + s) for s in self.suffixes(name)}, place)

    def buffer(self, name: str) -> Tensor:
        """Return one part by buffer name; much faster than `get_buffer`."""
        part = self._buffers[name]
        assert part is not None
        return part

    def suffixes(self, name: str) -> tuple[str, ...]:
        """Return the suffixes of a matrix's parts."""
        return self._suffixes[name]

    def view(
        self, name: str, buffers: Mapping[str, Tensor], place: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """Slice the parts of the matrix at `place` out of the stack `buffers`."""
        if place is None:
            return dict(buffers)
        expert, number = place
        heights = self._heights[name]
        return {
            suffix: buffer[expert, number * heights[suffix] : (number + 1) * heights[suffix]]
            for suffix, buffer in buffers.items()
        }

    def put(
        self,
        name: str,
        parts: Mapping[str, Tensor],
        place: tuple[int, int] | None,
        device: torch.device,
    ) -> None:
        """Store the parts of one matrix; the first of a stack allocates it."""
        shape, stack = self.matrices[name]
        for suffix, part in self.formats[name].parts(shape).items():
            if place is None:
                new = parts[suffix].to(device, part.dtype)
                self._buffers[name + suffix] = new.view(part.shape)
            elif self.get_buffer(name + suffix).is_meta:
                room = torch.empty(_stacked(part, stack), dtype=part.dtype, device=device)
                self._buffers[name + suffix] = room
        if place is not None:
            for suffix, view in self.parts(name, place).items():
                view.copy_(parts[suffix].view(view.shape))

    def decoded(self, name: str, dtype: torch.dtype) -> Tensor:
        """Decode a matrix, or a whole stack (E, P · O, I)."""
        shape, stack = self.matrices[name]
        if not stack:
            return self.formats[name].decode(self.parts(name), shape, dtype)
        E, P = stack
        return torch.stack(
            [
                torch.cat(
                    [
                        self.formats[name].decode(self.parts(name, (e, p)), shape, dtype)
                        for p in range(P)
                    ]
                )
                for e in range(E)
            ]
        )

    @property
    def weight_count(self) -> int:
        """The number of weights represented."""
        return sum(count for _, count in self.weight_counts())

    def weight_counts(self) -> Iterator[tuple[WeightFormat, int]]:
        """Yield each matrix's format and number of weights."""
        for name, (shape, stack) in self.matrices.items():
            yield self.formats[name], torch.Size(shape + stack).numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must change neither scales nor FP8 numbers, only where they are.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.matrices:
            for suffix in self.suffixes(name):
                old, new = before[name + suffix], self._buffers[name + suffix]
                if old is not None and new is not None and old.dtype != new.dtype:
                    self._buffers[name + suffix] = old.to(new.device)
        return self


def _stacked(part: TensorSpec, stack: Shape) -> Shape:
    if not stack:
        return part.shape
    E, P = stack
    return (E, P * part.shape[0], *part.shape[1:])


class QuantizedLinear(Quantized, LinearMap):
    """y = x·Wᵀ + b with quantised W.

    Args:
        compute_dtype: what inputs are converted to before they are multiplied; None for no change.
        shape: of the matrix, where several processes have parts of it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None,
        weight_format: WeightFormat,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        shape: Shape | None = None,
    ) -> None:
        super().__init__()
        self.format = weight_format
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.hold("weight", weight_format, shape or (out_features, in_features), device=device)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return self.together(x, [self])[0]

    @classmethod
    def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
        """Apply each of `maps` to x (..., I)."""
        kinds = {(m.format, m.compute_dtype) for m in maps}
        if len(kinds) > 1:
            return tuple(m.forward(x) for m in maps)
        ((weight_format, compute_dtype),) = kinds
        wide = x if compute_dtype is None else x.to(compute_dtype)
        operands = [m.operands(wide.dtype) for m in maps]
        if learns(x, *(bias for _, _, bias in operands)):
            return tuple(product(weight_format, wide, *one).to(x.dtype) for one in operands)
        return tuple(y.to(x.dtype) for y in weight_format.linears(wide, operands))

    def operands(self, dtype: torch.dtype) -> tuple[Parts, Shape, Tensor | None]:
        """Return matrix, shape and bias in a dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.parts("weight"), self.matrices["weight"][0], bias

    def matrix(self) -> Matrix | None:
        """Return the operands for a kernel, or None."""
        return None if self.compute_dtype else self.format.matrix(self.parts("weight"), self.bias)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        bias = self.bias is not None
        return f"{self.in_features} -> {self.out_features}, {self.format.name}, bias={bias}"


class QuantizedEmbedding(Quantized):
    """A quantised embedding, decoded row by row.

    Args:
        rows: how many ids have theirs here, where several processes have the others.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None,
        weight_format: WeightFormat,
        dtype: torch.dtype,
        device: torch.device | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.format = weight_format
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        height = num_embeddings if rows is None else rows
        self.hold("weight", weight_format, (height, embedding_dim), device=device)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to (B, T, C)."""
        rows = {suffix: part[ids.reshape(-1)] for suffix, part in self.parts("weight").items()}
        shape = (ids.numel(), self.embedding_dim)
        output = self.format.decode(rows, shape, self.dtype)
        return output.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) changes what is returned, as it does for embeddings of numbers.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


class QuantizedExperts(Quantized, ExpertStack):
    """Quantised experts; see `quintet.layers.moe.Experts`.

    Args:
        weight_formats: of gates and ups, and of downs.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        act: Activation,
        weight_formats: tuple[WeightFormat, WeightFormat],
        compute_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        E, C, F = num_experts, hidden_size, intermediate_size
        self.num_experts = num_experts
        self.compute_dtype = compute_dtype
        self.act_fn = act
        of_gates, of_downs = weight_formats
        self.hold("gate_up_proj", of_gates, (F, C), (E, 2), device=device)
        self.hold("down_proj", of_downs, (C, F), (E, 1), device=device)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Map tokens (N, C) through the experts `indices` (N, A), summed by `weights` (N, A)."""
        wide = x if self.compute_dtype is None else x.to(self.compute_dtype)
        output = None if learns(x, weights) else self._in_one_pass(wide, indices, weights)
        if output is not None:
            return output.to(x.dtype)
        return each_hit_expert(wide, indices, weights, self.num_experts, self._run).to(x.dtype)

    def _in_one_pass(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
        stacks = self.stacks() if self.act_fn is F.silu else None
        return None if stacks is None else gated_mlp(x, *stacks, indices, weights)

    def map(self, name: str, expert: int, x: Tensor) -> Tensor:
        """Apply an expert's matrix of the stack `name`, gate_up_proj or down_proj, to (n, I)."""
        wide = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return self._map(name, expert, wide).to(x.dtype)

    def stacks(self) -> tuple[Matrix, Matrix, Matrix] | None:
        """Return gate, up and down for kernels, or None."""
        gate, up = self._stack("gate_up_proj", 0), self._stack("gate_up_proj", 1)
        down = self._stack("down_proj", 0)
        return None if gate is None or up is None or down is None else (gate, up, down)

    def _stack(self, name: str, number: int) -> Matrix | None:
        """Return the matrix `number` of all experts."""
        heights = self._heights[name]
        places = {s: slice(number * n, (number + 1) * n) for s, n in heights.items()}
        parts = {s: self.buffer(name + s)[:, place] for s, place in places.items()}
        return self.formats[name].matrix(parts)

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        output = gated(self._map("gate_up_proj", expert, rows), self.act_fn)
        return self._map("down_proj", expert, output)

    def _map(self, name: str, expert: int, x: Tensor) -> Tensor:
        (rows, columns), (_, P) = self.matrices[name]
        weight_format = self.formats[name]
        if weight_format.cuts(rows):
            # What lies on top of each other is one matrix.
            parts = {s: self.buffer(name + s)[expert] for s in self.suffixes(name)}
            if learns(x):
                return product(weight_format, x, parts, (P * rows, columns), None)
            # A kernel for few vectors rounds differently, and how many there are is up to others.
            many = WeightFormat if batch_invariant() else type(weight_format)
            return many.linear(weight_format, x, parts, (P * rows, columns), None)
        maps = [(self.parts(name, (expert, p)), (rows, columns), None) for p in range(P)]
        if learns(x):
            return torch.cat([product(weight_format, x, *one) for one in maps], dim=-1)
        return torch.cat(list(weight_format.linears(x, maps)), dim=-1)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        C, F = self.matrices["down_proj"][0]
        names = dict.fromkeys(weight_format.name for weight_format in self.formats.values())
        return f"{self.num_experts} of {C} -> {F} -> {C}, {' and '.join(names)}"


def refuse_idle_training(model: nn.Module, loss: Tensor) -> None:
    """Refuse a training loss that depends on no trainable weight.

    Raises:
        InputError: it is one.
    """
    idle = model.training and torch.is_grad_enabled() and not loss.requires_grad
    if idle and any(isinstance(module, Quantized) for module in model.modules()):
        raise InputError(
            "a quantised model cannot be trained by itself: its weights are steps on a ladder, "
            "without gradients. Put an adapter on it, load it without quantization_config, or "
            "call model.eval() to measure a loss"
        )


def experts_like(
    experts: Experts,
    weight_formats: tuple[WeightFormat, WeightFormat],
    compute_dtype: torch.dtype | None,
) -> QuantizedExperts:
    """Return empty quantised experts of the same sizes."""
    E, C, F = experts.down_proj.shape
    quantized = QuantizedExperts(
        E,
        C,
        F,
        act=experts.act_fn,
        weight_formats=weight_formats,
        compute_dtype=compute_dtype,
        device=experts.down_proj.device,
    )
    # Of all processes, as there.
    quantized.num_experts = experts.num_experts
    return quantized
