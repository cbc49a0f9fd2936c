"""Rounds a model's matrices on a text: each makes up for its own and earlier errors.

Layer by layer, the model runs over the text; what goes into the layer's matrices says how errors of
their columns are spread (`quintet.ops.error_feedback`); and each is rounded, and holds the rounded
numbers from then on, so that those behind it see what will be there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from quintet.errors import InputError, shown
from quintet.layers.moe import Experts
from quintet.quantization.apply import Slot
from quintet.quantization.formats import Parts, WeightFormat

# The most bytes of Σ x xᵀ that are there at once, unless one matrix needs more.
MEMORY = 2**31
_LAYER = re.compile(r".*?\.layers\.\d+\.")


class Runs(Protocol):
    """Interface of a model that can be run over a text."""

    def __call__(self, input_ids: Tensor, *, use_cache: bool) -> Any:
        """Run over ids (B, T)."""
        ...

    def tied_names(self) -> Mapping[str, str]:
        """Return the names of weights that are others', and of those."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head."""
        ...


class MatrixPlace(NamedTuple):
    """A matrix of a model: by its weight's name, of a stack by its expert."""

    name: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix to be rounded.

    Attributes:
        names: of its weight, all of them.
        expert: its number in a stack.
        module: what multiplies by it.
        weight: (O, I), a view of the module's.
        count: of how many parts it is.
        format: of each.
    """

    names: list[str]
    expert: int | None
    module: nn.Linear | Experts
    weight: Tensor
    count: int
    format: WeightFormat

    @property
    def place(self) -> MatrixPlace:
        """Its first name."""
        return MatrixPlace(self.names[0], self.expert)


def rounded(
    model: Runs, slots: Mapping[str, Slot], batches: Sequence[Tensor]
) -> Iterator[tuple[MatrixPlace, list[Parts]]]:
    """Yield each matrix in the format of its slot; a stack's in the parts of its slot.

    What no token of the text came to (an expert, layers of multi-token prediction) and embeddings
    that are no head are not there.

    Args:
        model: in plain numbers; it holds the rounded ones in the end.
        slots: where matrices go, by their names.
        batches: ids (B, T) of a text like those that the model is for.

    Raises:
        InputError: there is no text, or what goes into a matrix is not finite.
    """
    for ids in batches:
        if not (isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype in (torch.long, torch.int)):
            raise InputError(
                f"calibrate has {shown(ids)} among its batches; each has to be a tensor "
                "of ids (B, T)"
            )
    if not sum(ids.numel() for ids in batches):
        raise InputError("there is no text to calibrate with; give at least one batch of ids")
    device = next(cast("nn.Module", model).parameters()).device
    for matrices in _rounds(list(_matrices(model, slots))):
        grams = _Grams(matrices)
        with torch.no_grad(), grams:
            for ids in batches:
                grams.begin()
                with suppress(_EnoughError):
                    model(input_ids=ids.to(device), use_cache=False)
        for one in matrices:
            gram = grams.found.get(one.place)
            if gram is not None:
                parts = _rounded(one, gram)
                for name in one.names:
                    yield MatrixPlace(name, one.expert), parts


def _rounded(one: _Matrix, gram: Tensor) -> list[Parts]:
    """Encode a matrix, and leave the decoded values in its place."""
    try:
        halves = one.weight.detach().chunk(one.count)
        encoded = [one.format.encode(half, gram) for half in halves]
    except InputError as error:
        raise InputError(f"{one.place.name}: {error}") from error
    with torch.no_grad():
        for half, parts in zip(halves, encoded, strict=True):
            half.copy_(one.format.decode(parts, tuple(half.shape), torch.float32))
    return list(encoded)


def _matrices(model: Runs, slots: Mapping[str, Slot]) -> Iterator[_Matrix]:
    """Yield the matrices in the order in which they run; a head comes last."""
    module, tied = cast("nn.Module", model), model.tied_names()
    head, last = model.get_output_embeddings(), []
    # What several layers share has several names.
    names: dict[tuple[nn.Module, str], list[str]] = {}
    for name in slots:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if name in tied.values() and isinstance(owner, nn.Embedding) and head is not None:
            owner = head
        names.setdefault((owner, leaf), []).append(name)
    for (owner, leaf), own in names.items():
        slot = slots[own[0]]
        wanted = slot.module.formats[slot.name]
        if isinstance(owner, Experts):
            _, (E, P) = slot.module.matrices[slot.name]
            stack = owner.get_parameter(leaf)
            for expert in range(E):
                yield _Matrix(own, expert, owner, stack[expert], P, wanted)
        elif isinstance(owner, nn.Linear):
            found = _Matrix(own, None, owner, owner.weight, 1, wanted)
            if owner is head:
                last.append(found)
            else:
                yield found
    yield from last


def _rounds(matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
    """Yield groups of matrices to calibrate together: of one layer, and within the memory."""
    now: list[_Matrix] = []
    size, layer = 0, ""
    for one in matrices:
        found = _LAYER.match(one.place.name)
        own, nbytes = found.group() if found else "", 4 * one.weight.shape[-1] ** 2
        if now and (own != layer or size + nbytes > MEMORY):
            yield now
            now, size = [], 0
        now.append(one)
        size, layer = size + nbytes, own
    if now:
        yield now


class _EnoughError(Exception):
    """Ends a forward once all maps to calibrate have run."""


class _Grams:
    """Sums x xᵀ of a map's inputs, while inside.

    Attributes:
        found: (I, I) of each that something went into.
    """

    def __init__(self, matrices: Sequence[_Matrix]) -> None:
        self.found: dict[MatrixPlace, Tensor] = {}
        self._by_module: dict[nn.Module, list[MatrixPlace]] = {}
        for one in matrices:
            self._by_module.setdefault(one.module, []).append(one.place)
        # How often modules are called in a forward is seen in the first.
        self._calls = 0
        self._enough: int | None = None

    def __enter__(self) -> None:
        self._handles = [
            module.register_forward_pre_hook(
                self._saw_tokens if isinstance(module, Experts) else self._saw
            )
            for module in self._by_module
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Begin another forward."""
        if self._calls:
            self._enough = self._calls
        self._calls = 0

    def _saw(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for place in self._by_module[module]:
            self._add(place, args[0].flatten(0, -2))
        self._called()

    def _saw_tokens(self, module: Experts, args: tuple[Any, ...]) -> None:
        x, indices, _ = args
        for place in self._by_module[module]:
            assert place.expert is not None
            own = x[(indices == place.expert).any(-1)]
            if place.name.endswith("down_proj"):
                gate, up = module.map("gate_up_proj", place.expert, own).chunk(2, dim=-1)
                own = module.act_fn(gate) * up
            if len(own):
                self._add(place, own)
        self._called()

    def _add(self, place: MatrixPlace, x: Tensor) -> None:
        x = x.to(torch.float32)
        gram = self.found.get(place)
        if gram is None:
            self.found[place] = x.T @ x
        else:
            gram.addmm_(x.T, x)

    def _called(self) -> None:
        self._calls += 1
        if self._calls == self._enough:
            raise _EnoughError
