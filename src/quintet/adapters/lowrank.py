"""Low-rank additions: W + s · B A.

Legend: docs/notation.md; r is the rank of a matrix of an adapter. All is float32, however narrow
the model is: what is added is small beside what it is added to, and is rounded once, with the sum.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """What is computed from tensors, again when one of them changes."""

    def __init__(self) -> None:
        self._key: object = None
        # Another tensor may come to lie where one of these has been.
        self._tensors: list[ReferenceType[Tensor]] = []
        self._value: Value | None = None

    def get(
        self,
        tensors: Iterable[Tensor],
        make: Callable[[], Value],
        numbers: Sequence[float] = (),
    ) -> Value:
        """Return `make(...)` for these tensors and numbers, cached."""
        tensors = list(tensors)
        key = (*map(_version, tensors), *numbers)
        same = key == self._key and all(
            last() is tensor for last, tensor in zip(self._tensors, tensors, strict=True)
        )
        if self._value is None or not same:
            self._value, self._key, self._tensors = make(), key, list(map(ref, tensors))
        return self._value

    def __deepcopy__(self, memo: object) -> "Remembered[Value]":
        return Remembered()

    def __reduce__(self) -> tuple[type["Remembered[Value]"], tuple[()]]:
        return Remembered, ()


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


class Addition(nn.Module, ABC):
    """An addition to a matrix (O, I) or a stack (E, O, I).

    Attributes:
        scale: s.
    """

    scale: float

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """Return the addition as a dense tensor in float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the suffixes of their names in files."""


class LowRank(Addition):
    """y + s · B(A x); with a magnitude (DoRA), m · V / ‖V‖ per row of V = W + s B A.

    Args:
        A: (r, I).
        B: (O, r).
        scale: s.
        bias: (O,) which is added to B(A x); None for none.
        magnitude: (O,) m of DoRA (arXiv:2402.09353); None without.
        dropout: the share of x that is left out in training.
        infix: how the names of the tensors begin in a file.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale = scale
        self.dropout = dropout
        # Adds up what other processes find of their columns; None if all are here.
        self.sums: Callable[[Tensor], Tensor] | None = None
        self._norm: Remembered[Tensor] = Remembered()

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_A.shape[0]

    @property
    def is_product(self) -> bool:
        """Whether it is s · B A, without a bias or a magnitude."""
        return self.bias is None and self.magnitude is None

    def delta(self, x: Tensor) -> Tensor:
        """Return s · B(A x), (..., O), ignoring a magnitude."""
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)
        return F.linear(low, self.lora_B, self.bias) * self.scale

    def added(
        self, x: Tensor, y: Tensor, weight: Callable[[], Tensor], bias: Tensor | None
    ) -> Tensor:
        """Return y = x·Wᵀ + b, (..., O), with the addition.

        Args:
            weight: makes W in float32.
            bias: b.
        """
        drops = self.training and self.dropout > 0
        if self.magnitude is None:
            return self.delta(F.dropout(x, self.dropout) if drops else x)
        share = self.magnitude / self._norms(weight)
        if drops:
            x = F.dropout(x, self.dropout)
            y = F.linear(x.to(self.lora_A.dtype), weight())
        elif bias is not None:
            y = y - bias
        return (share - 1) * y + share * self.delta(x)

    def change(self, weight: Tensor) -> Tensor:
        """Return the addition to a matrix (O, I) in float32."""
        change = self._product()
        if self.magnitude is None:
            return change
        whole = weight + change
        return whole * (self.magnitude / _row_norms(whole))[:, None] - weight

    def bias_change(self, weight: Tensor) -> Tensor | None:
        """Return the addition to the bias (O,), given the matrix `weight`."""
        if self.bias is None:
            return None
        change = self.bias * self.scale
        if self.magnitude is None:
            return change
        return change * (self.magnitude / _row_norms(weight + self._product()))

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.bias is not None:
            named["lora_B.bias"] = self.bias
        if self.magnitude is not None:
            named["lora_magnitude_vector"] = self.magnitude
        return named

    def _product(self) -> Tensor:
        return self.lora_B @ self.lora_A * self.scale

    def _norms(self, weight: Callable[[], Tensor]) -> Tensor:
        """Return ‖V‖ (O,), detached as in its paper."""

        def make() -> Tensor:
            with torch.no_grad():
                whole = weight() + self._product()
                if self.sums is None:
                    return _row_norms(whole)
                return self.sums(whole.square().sum(dim=1)).sqrt()

        if self.training or torch.compiler.is_compiling():
            return make()
        return self._norm.get((self.lora_A, self.lora_B), make)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        O, I = self.lora_B.shape[0], self.lora_A.shape[1]
        dora = "" if self.magnitude is None else ", with magnitudes"
        return f"{I} -> {self.rank} -> {O}, scale={self.scale:g}{dora}"


class EmbeddingLowRank(Addition):
    """A low-rank addition to an embedding, s · (B A)ᵀ[id].

    Args:
        A: (r, V).
        B: (C, r).
        scale: s.
        magnitude: (C,) m, by which each of the C numbers of all vectors is scaled; None without.
    """

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, *, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale = scale
        self._norm: Remembered[Tensor] = Remembered()

    def added(self, ids: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the vectors y (..., C) of ids (...) with the addition."""
        change = F.linear(F.embedding(ids, self.lora_A.T), self.lora_B) * self.scale
        if self.magnitude is None:
            return change

        def make() -> Tensor:
            with torch.no_grad():
                return _row_norms((weight() + self._product()).T)

        norms = make() if self.training else self._norm.get((self.lora_A, self.lora_B), make)
        share = self.magnitude / norms
        return (share - 1) * y + share * change

    def change(self, weight: Tensor) -> Tensor:
        """Return the addition to the embedding (V, C) in float32."""
        change = self._product()
        if self.magnitude is None:
            return change
        whole = weight + change
        return whole * (self.magnitude / _row_norms(whole.T)) - weight

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {
            "lora_embedding_A": self.lora_A,
            "lora_embedding_B": self.lora_B,
        }
        return (
            named if self.magnitude is None else {**named, "lora_magnitude_vector": self.magnitude}
        )

    def _product(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scale

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        C, V = self.lora_B.shape[0], self.lora_A.shape[1]
        return f"{V} -> {self.lora_A.shape[0]} -> {C}, scale={self.scale:g}"


class ExpertStackLowRank(Addition):
    """A low-rank addition to stacked experts, s · B_e A_e for expert e of E.

    Args:
        A: (E·r, I), an expert's r rows behind each other.
        B: (O, r·E), the columns of all experts beside each other for each of the r.
        E: how many experts there are.
        scale: s.
    """

    def __init__(self, A: Tensor, B: Tensor, E: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.num_experts = E
        self.scale = scale

    @property
    def rank(self) -> int:
        """The rank per expert."""
        return self.lora_A.shape[0] // self.num_experts

    def delta(self, expert: int, x: Tensor) -> Tensor:
        """Return the addition to an expert's output (n, O) for x (n, I)."""
        A = torch.unflatten(self.lora_A, 0, (self.num_experts, -1))[expert]
        B = torch.unflatten(self.lora_B, 1, (-1, self.num_experts))[:, :, expert]
        return F.linear(F.linear(x.to(A.dtype), A), B) * self.scale

    def change(self, weight: Tensor) -> Tensor:
        """Return the addition to a stack (E, O, I) in float32."""
        A = torch.unflatten(self.lora_A, 0, (self.num_experts, -1))
        B = torch.unflatten(self.lora_B, 1, (-1, self.num_experts))
        return torch.einsum("ore,eri->eoi", B, A) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        E, O, I = self.num_experts, self.lora_B.shape[0], self.lora_A.shape[1]
        return f"{E} of {I} -> {self.rank} -> {O}, scale={self.scale:g}"


class NewRows(nn.Module):
    """Replacement vectors for some ids.

    Args:
        ids: (n,).
        rows: (n, C).
    """

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.rows = nn.Parameter(rows)

    def in_vectors(self, ids: Tensor, y: Tensor) -> Tensor:
        """Replace vectors y (..., C) of the ids (...) concerned."""
        same = ids[..., None] == self.ids
        ours = same.any(dim=-1)
        rows = F.embedding(same.to(torch.int8).argmax(dim=-1), self.rows)
        return torch.where(ours[..., None], rows.to(y.dtype), y)

    def in_logits(self, x: Tensor, y: Tensor) -> Tensor:
        """Replace logits y (..., V) of the ids concerned, under tied embeddings."""
        own = F.linear(x.to(self.rows.dtype), self.rows)
        return y.index_copy(-1, self.ids, own.to(y.dtype))

    def in_matrix(self, weight: Tensor) -> Tensor:
        """Replace the rows concerned of a matrix (V, C)."""
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        n, C = self.rows.shape
        return f"{n} vectors of {C}"


def _row_norms(matrix: Tensor) -> Tensor:
    return matrix.square().sum(dim=1).sqrt()
