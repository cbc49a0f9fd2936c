"""Sharding of adapters: each is cut like the matrix it adds to.

Where the rows of a matrix are cut, so are those of B, and every process has all of A, of whose
gradient it finds a part; where its columns are, so are those of A, and B is had by all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.adapters.adaptation import Adaptation
from quintet.adapters.bases import is_embedding, is_experts, shape_of
from quintet.adapters.forwards import adapted_modules
from quintet.adapters.lowrank import EmbeddingLowRank, ExpertStackLowRank, LowRank
from quintet.errors import InputError
from quintet.parallel.placement import Shard, cuts_of
from quintet.parallel.shared_buffer import sum_in_place
from quintet.sharding import WHOLE, Cut, Section, Sharding


@dataclass(frozen=True, slots=True)
class _Place:
    """An adapter's changes to one module.

    Attributes:
        path: of the module.
        prefix: what the names of its tensors begin with.
    """

    module: nn.Module
    path: str
    prefix: str
    adaptation: Adaptation


def adapted_names(model: nn.Module) -> frozenset[str]:
    """Return the names of all adapter parameters."""
    prefixes = [place.prefix for place in _places(model)]
    names = (name for name, _ in model.named_parameters())
    return frozenset(name for name in names if any(name.startswith(p) for p in prefixes))


def with_adapters(model: nn.Module, sharding: Sharding) -> Sharding:
    """Return a model's sharding table, extended by its adapters.

    Raises:
        InputError: an adapter does what cannot be done in parts.
    """
    for place in _places(model):
        for table in _tables(place, sharding):
            sharding = sharding | table.below(place.prefix)
    return sharding


def connect_adapters(
    model: nn.Module,
    sharding: Sharding,
    group: dist.ProcessGroup | None,
    shards: Mapping[str, Shard],
) -> None:
    """Connect a sharded model's adapters across processes.

    Args:
        model: with its adapters, both cut.
        sharding: the table that `with_adapters` returned.
        group: the processes along tp.
        shards: what this process has of tensors that may be sliced further.
    """
    for place in _places(model):
        for name, addition in place.adaptation.added.items():
            if isinstance(addition, ExpertStackLowRank):
                shard = shards.get(f"{place.path}.{name}")
                # What is in fewer bits has other names, and is not sliced.
                shape = shape_of(place.module, name) if shard is None else shard.local_shape
                addition.num_experts = cast("tuple[int, ...]", shape)[0]
            if isinstance(addition, LowRank) and group is not None:
                cuts = cuts_of(f"{place.path}.{name}", sharding)
                if any(cut.dim == 1 for cut in cuts):
                    addition.sums = _Sums(group)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums partial results over processes."""

    group: dist.ProcessGroup

    def __call__(self, x: Tensor) -> Tensor:
        total = x.contiguous()
        with torch.no_grad():
            sum_in_place(total, self.group)
        return total

    def __deepcopy__(self, memo: object) -> "_Sums":
        return self


def _places(model: nn.Module) -> Iterator[_Place]:
    paths = {module: path for path, module in model.named_modules()}
    for module in adapted_modules(model):
        path = paths[module]
        for name, uses in cast("nn.ModuleDict", module.adapters).items():
            for use, adaptation in cast("nn.ModuleDict", uses).items():
                prefix = f"{path}.adapters.{name}.{use}."
                yield _Place(module, path, prefix, cast("Adaptation", adaptation))


def _tables(place: _Place, sharding: Sharding) -> Iterator[Sharding]:
    adaptation, vocabulary = place.adaptation, place.path in sharding.vocabulary
    looked_up = vocabulary and is_embedding(place.module)
    if adaptation.rows is not None or adaptation.experts or (looked_up and adaptation.instead):
        contents = "vectors of single ids" if adaptation.rows is not None else "parts of its own"
        raise InputError(
            f"an adapter has {contents} in {place.path}, which is cut among processes along tp; "
            "divide the training by fsdp or dp instead"
        )
    for name in adaptation.instead:
        whole = f"{place.path}.{name}"
        key = f"instead.{name}"
        yield Sharding(
            {key: cuts_of(whole, sharding)},
            first_only=(key,) if whole in sharding.first_only else (),
            partial=(key,) if whole in sharding.partial else (),
        )
    for name, addition in adaptation.added.items():
        whole = f"{place.path}.{name}"
        cuts, key = cuts_of(whole, sharding), f"added.{name}."
        if isinstance(addition, EmbeddingLowRank):
            if addition.magnitude is not None:
                raise InputError(f"{place.path} is cut along tp, where use_dora needs all of it")
            names = [f"{key}{leaf}" for leaf, _ in addition.named_parameters()]
            # Behind the sum over processes, all compute with the same.
            yield Sharding(dict.fromkeys(names, WHOLE))
        elif isinstance(addition, ExpertStackLowRank) and is_experts(place.module):
            yield _of_stack(addition, cuts).below(key)
        else:
            assert isinstance(addition, LowRank)
            partial = whole in sharding.partial
            yield _of_matrix(addition, cuts, partial=partial).below(key)


def _of_matrix(addition: LowRank, cuts: tuple[Cut, ...], *, partial: bool) -> Sharding:
    """Return the cut of an addition to a matrix (O, I), with A (r, I) and B (O, r)."""
    rows = tuple(cut for cut in cuts if cut.dim == 0)
    columns = tuple(cut for cut in cuts if cut.dim == 1)
    parameters = {"lora_A": columns, "lora_B": rows}
    parts = ["lora_A"] if rows or partial else []
    parts += ["lora_B"] if columns or partial else []
    if addition.bias is not None:
        parameters["bias"] = rows
        parts += ["bias"] if partial else []
    if addition.magnitude is not None:
        parameters["magnitude"] = rows
        # It scales what is added up behind.
        parts += ["magnitude"] if columns or partial else []
    first = ("bias",) if columns and addition.bias is not None else ()
    return Sharding(parameters, partial=tuple(parts), first_only=first)


def _of_stack(addition: ExpertStackLowRank, cuts: tuple[Cut, ...]) -> Sharding:
    """Return the cut of an addition to a stack (E, O, I), with A (E·r, I), B (O, r·E)."""
    E, r = addition.num_experts, addition.rank
    key = "num_experts"
    inner = [cut for cut in cuts if cut.dim > 0]
    rows = tuple(cut for cut in inner if cut.dim == 1)
    columns = tuple(replace(cut, dim=1) for cut in inner if cut.dim == 2)
    rows = tuple(replace(cut, dim=0) for cut in rows)
    return Sharding(
        {
            "lora_A": (Cut(0, (Section(E, r, key),), "ep"), *columns),
            # For each of the r there are the columns of all experts.
            "lora_B": (*rows, Cut(1, (Section(E, 1, key),) * r, "ep")),
        },
        partial=("lora_A",) if rows else ("lora_B",),
    )
