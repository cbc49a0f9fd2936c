"""Builds an adapter from its tensors; everything is checked before data is read.

Ranks are those of the tensors. Nothing is left over: a tensor that no module takes is an error, as
an adapter of which a part is lost is another one.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from quintet.adapters.adaptation import EXPERT_STACKS, Adaptation, expert_name
from quintet.adapters.bases import device_of, is_embedding, is_experts, is_linear, shape_of
from quintet.adapters.config import LoraConfig
from quintet.adapters.layout import ModuleLayout, Spot
from quintet.adapters.lowrank import EmbeddingLowRank, ExpertStackLowRank, LowRank, NewRows
from quintet.adapters.names import DELTA, Name, parse, path_of_expert
from quintet.checkpoint import TensorInfo, Weights
from quintet.errors import CheckpointError, UnsupportedModelError, listed, shown
from quintet.folder import ADAPTER_CONFIG_NAME

# What an adapter does, by module and use.
Adaptations = dict[tuple[nn.Module, str], Adaptation]
Put = Callable[[Adaptation, Mapping[str, Tensor]], None]
MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"
# Keys that ask for tensors; without them, the adapter would be another one.
EXPECTED_BY = {MAGNITUDE: "use_dora", BIAS: "lora_bias"}


class MisfitError(CheckpointError):
    """An adapter's tensors are of another model."""


class IncompleteAdapterWarning(UserWarning):
    """An adapter lacks tensors for modules that its config targets."""


@dataclass
class _Group:
    """The tensors of one wrapped module, by role."""

    spot: Spot
    path: str
    depth: int
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    expert: tuple[int, str] | None = None

    def shape(self, leaf: str) -> tuple[int, ...]:
        return self.infos[leaf].shape


def read_adapter(
    layout: ModuleLayout, config: LoraConfig, weights: Weights, where: str
) -> Adaptations:
    """Read an adapter for a model.

    Raises:
        CheckpointError: a tensor is of another shape or dtype, belongs to nothing, or is missing.
        UnsupportedModelError: it does something to a module that is not possible here.
    """
    groups, replaced = _grouped(layout, config, weights.tensors, where)
    puts: list[tuple[Spot, dict[str, str], Put]] = []
    for group in groups:
        names = {leaf: info.name for leaf, info in group.infos.items()}
        puts.append((group.spot, names, _Builder(config, group, where).put()))
    for spot, leaf, info in replaced:
        puts.append((spot, {leaf: info.name}, _replace(spot, leaf, info, where)))
    adaptations: Adaptations = {}
    for spot, names, put in puts:
        own = {leaf: _read(weights, name, device_of(spot.module)) for leaf, name in names.items()}
        adaptations.setdefault((spot.module, spot.use), Adaptation())
        put(adaptations[spot.module, spot.use], own)
    tie(layout, adaptations)
    if not adaptations:
        raise CheckpointError(f"{where} holds no tensor; it is no adapter")
    return adaptations


def names_of(layout: ModuleLayout, adaptations: Adaptations) -> Iterator[str]:
    """Yield the paths of modules that an adapter changes, and of tensors that it replaces."""
    for spot in layout:
        if (found := adaptations.get((spot.module, spot.use))) is not None:
            yield layout.named(spot.path)
            yield from (f"{layout.named(spot.path)}.{leaf}" for leaf in found.instead)


def tie(layout: ModuleLayout, adaptations: Adaptations) -> None:
    """Let a tied head share replaced embedding vectors."""
    if layout.tied is None:
        return
    head, embedding = (layout.spots[path] for path in layout.tied)
    adaptation = adaptations.get((embedding.module, embedding.use))
    if adaptation is not None and adaptation.rows is not None:
        adaptations.setdefault((head.module, head.use), Adaptation()).rows = adaptation.rows


def _read(weights: Weights, name: str, device: torch.device) -> Tensor:
    ((_, tensor),) = weights.read([name])
    # What is narrower is exact in float32; PEFT computes in it, too.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    placed = tensor.to(device, wide)
    if placed is not tensor:
        weights.forget(name)
    return placed


def _grouped(
    layout: ModuleLayout, config: LoraConfig, tensors: Mapping[str, TensorInfo], where: str
) -> tuple[list[_Group], list[tuple[Spot, str, TensorInfo]]]:
    groups: dict[tuple[str, int], _Group] = {}
    replaced: list[tuple[Spot, str, TensorInfo]] = []
    lost = []
    for name, info in tensors.items():
        _check_dtype(info, where)
        parsed = parse(name)
        spot = None if parsed is None else layout.find(parsed.path)
        expert = None
        if parsed is not None and spot is None and (found := path_of_expert(parsed.path)):
            spot, expert = layout.find(found[0]), found[1:]
            if spot is not None and not is_experts(spot.module):
                spot = None
        if parsed is None or spot is None:
            lost.append(name)
        elif parsed.own:
            key = parsed.path, parsed.depth
            group = groups.setdefault(key, _Group(spot, parsed.path, parsed.depth, {}, expert))
            group.infos[parsed.leaf] = info
        elif expert is None and _takes(layout, config, parsed, spot):
            replaced.append((spot, parsed.leaf, info))
        else:
            lost.append(name)
    if lost:
        raise MisfitError(
            f"{where} holds {len(lost)} tensors that this model, or the adapter's configuration, "
            f"has no place for:\n{listed([shown(name) for name in lost])}\n"
            "An adapter fits the model that it was trained on alone"
        )
    return list(groups.values()), replaced


def _takes(layout: ModuleLayout, config: LoraConfig, name: Name, spot: Spot) -> bool:
    """Return whether an adapter may replace a module's tensor."""
    if shape_of(spot.module, name.leaf) is None:
        return False
    if config.bias != "none" and name.leaf == "bias":
        return True
    ends = is_embedding(spot.module) or spot.path in (layout.tied or ())
    return ends or name.path.endswith("lm_head") or config.saves(name.path)


def _check_dtype(info: TensorInfo, where: str) -> None:
    if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
        raise CheckpointError(
            f"{where}: tensor {shown(info.name)} is {info.dtype}; an adapter's are floating point "
            "of 16 bits or more"
        )


def _replace(spot: Spot, leaf: str, info: TensorInfo, where: str) -> Put:
    expected = shape_of(spot.module, leaf)
    if expected != info.shape:
        hint = ""
        if expected and len(expected) == 2 and info.shape[1:] == expected[1:]:
            hint = f"; call model.resize_token_embeddings({info.shape[0]}) first"
        raise MisfitError(
            f"{where}: {shown(info.name)} has the shape {list(info.shape)} and the model's "
            f"{list(expected or ())}{hint}"
        )

    def put(adaptation: Adaptation, tensors: Mapping[str, Tensor]) -> None:
        own = spot.module._parameters.get(leaf)
        tensor = tensors[leaf]
        if own is not None and own.is_floating_point():
            tensor = tensor.to(own.dtype)
        adaptation.instead[leaf] = nn.Parameter(tensor)

    return put


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds a module's additions from a group of tensors."""

    config: LoraConfig
    group: _Group
    where: str

    def put(self) -> Put:
        """Check the shapes, and return a function that loads the tensors."""
        module, leaves = self.group.spot.module, self.group.infos.keys()
        if DELTA in leaves:
            self._need({DELTA})
            return self._rows()
        if self.group.expert is not None:
            return self._one_expert(*self.group.expert)
        if is_embedding(module):
            return self._embedding()
        if is_experts(module):
            return self._experts()
        if is_linear(module):
            return self._linear()
        return self._parameter()

    def _linear(self) -> Put:
        extra = self._extra_leaves()
        self._need({"lora_A.weight", "lora_B.weight", *extra}, {BIAS, MAGNITUDE})
        shape = shape_of(self.group.spot.module, "weight")
        assert shape is not None
        return partial(self._put_matrix, name="weight", scale=self._low_rank(shape[0], shape[1]))

    def _put_matrix(
        self, adaptation: Adaptation, tensors: Mapping[str, Tensor], *, name: str, scale: float
    ) -> None:
        adaptation.added[name] = self._built(tensors, scale)

    def _put_stack(
        self,
        adaptation: Adaptation,
        tensors: Mapping[str, Tensor],
        *,
        name: str,
        E: int,
        rank: int,
    ) -> None:
        scale = self.config.scale(f"{self.group.path}.{name}", rank)
        adaptation.added[name] = ExpertStackLowRank(
            tensors["lora_A.weight"], tensors["lora_B.weight"], E, scale
        )

    def _one_expert(self, expert: int, part: str) -> Put:
        self._need({"lora_A.weight", "lora_B.weight"})
        if extra := self._extra_leaves():
            raise self._missing(sorted(extra))
        stack = next((name for name, parts in EXPERT_STACKS.items() if part in parts), None)
        shape = None if stack is None else shape_of(self.group.spot.module, stack)
        if stack is None or shape is None or expert >= shape[0]:
            raise MisfitError(self._why("there is no such matrix of an expert"))
        scale = self._low_rank(shape[1] // len(EXPERT_STACKS[stack]), shape[2])

        def put(adaptation: Adaptation, tensors: Mapping[str, Tensor]) -> None:
            adaptation.experts[expert_name(expert, part)] = self._built(tensors, scale)

        return put

    def _built(self, tensors: Mapping[str, Tensor], scale: float) -> LowRank:
        magnitude = tensors.get(MAGNITUDE)
        return LowRank(
            tensors["lora_A.weight"],
            tensors["lora_B.weight"],
            scale,
            bias=tensors.get(BIAS),
            magnitude=None if magnitude is None else magnitude.reshape(-1),
            dropout=self.config.lora_dropout,
        )

    def _embedding(self) -> Put:
        extra = self._extra_leaves() - {BIAS}
        self._need({"lora_embedding_A", "lora_embedding_B", *extra}, {MAGNITUDE})
        shape = shape_of(self.group.spot.module, "weight")
        assert shape is not None
        V, C = shape
        rank = (
            self.group.shape("lora_embedding_A")[0] if self.group.shape("lora_embedding_A") else 0
        )
        self._shapes({"lora_embedding_A": (rank, V), "lora_embedding_B": (C, rank)}, magnitude=C)
        scale = self.config.scale(self.group.path, rank)

        def put(adaptation: Adaptation, tensors: Mapping[str, Tensor]) -> None:
            magnitude = tensors.get(MAGNITUDE)
            adaptation.added["weight"] = EmbeddingLowRank(
                tensors["lora_embedding_A"],
                tensors["lora_embedding_B"],
                scale,
                magnitude=None if magnitude is None else magnitude.reshape(-1),
            )

        return put

    def _experts(self) -> Put:
        self._need({"lora_A.weight", "lora_B.weight"})
        A, B = self.group.shape("lora_A.weight"), self.group.shape("lora_B.weight")
        shapes = {name: shape_of(self.group.spot.module, name) for name in EXPERT_STACKS}
        for name, shape in shapes.items():
            assert shape is not None
            E, O, I = shape
            if len(A) == 2 == len(B) and (B[0], A[1]) == (O, I):
                if A[0] % E or not A[0] or A[0] != B[1]:
                    raise self._error(
                        f"their {A[0]} and {B[1]} numbers are no rank for {E} experts"
                    )
                return partial(self._put_stack, name=name, E=E, rank=A[0] // E)
        raise MisfitError(self._why(f"the stacks of experts have the shapes {shapes}"))

    def _parameter(self) -> Put:
        """Build the addition to a parameter that is no linear map, such as a router's."""
        self._need({"lora_A.weight", "lora_B.weight"})
        module = self.group.spot.module
        A, B = self.group.shape("lora_A.weight"), self.group.shape("lora_B.weight")
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 2 and len(A) == 2 == len(B) and tensor.shape == (B[0], A[1]):
                return partial(self._put_matrix, name=name, scale=self._low_rank(B[0], A[1]))
        raise UnsupportedModelError(
            f"{self.where} changes {shown(self.group.path)}, a {type(module).__name__}, which has "
            "no matrix that an adapter of low rank can change here"
        )

    def _rows(self) -> Put:
        module, ids = self.group.spot.module, self._ids()
        shape = shape_of(module, "weight")
        if not is_embedding(module) or shape is None:
            raise self._error("only an embedding has vectors of ids")
        if any(one >= shape[0] for one in ids):
            raise self._error(f"trainable_token_indices={shown(ids)} and there are {shape[0]} ids")
        self._shapes({DELTA: (len(ids), shape[1])})

        def put(adaptation: Adaptation, tensors: Mapping[str, Tensor]) -> None:
            rows = tensors[DELTA]
            index = torch.tensor(ids, dtype=torch.long, device=rows.device)
            adaptation.rows = NewRows(index, rows)

        return put

    def _ids(self) -> list[int]:
        given = self.config.trainable_token_indices
        if isinstance(given, dict):
            path = self.group.path
            fits = (v for k, v in given.items() if path == k or path.endswith(f".{k}"))
            given = next(fits, None)
        if not given:
            raise self._error("trainable_token_indices does not say whose vectors they are")
        if len(set(given)) < len(given):
            raise self._error(f"trainable_token_indices={shown(given)} names an id twice")
        return given

    def _low_rank(self, O: int, I: int) -> float:
        A = self.group.shape("lora_A.weight")
        rank = A[0] if A else 0
        shapes = {"lora_A.weight": (rank, I), "lora_B.weight": (O, rank), BIAS: (O,)}
        self._shapes(shapes, magnitude=O)
        return self.config.scale(self.group.path, rank)

    def _shapes(
        self, expected: Mapping[str, tuple[int, ...]], magnitude: int | None = None
    ) -> None:
        for leaf, info in self.group.infos.items():
            if leaf == MAGNITUDE:
                fits = magnitude is not None and sorted(info.shape)[-1:] == [magnitude]
                fits = fits and torch.Size(info.shape).numel() == magnitude
                wanted: tuple[int, ...] = (magnitude or 0,)
            else:
                wanted = expected[leaf]
                fits = info.shape == wanted and 0 not in wanted
            if not fits:
                raise MisfitError(
                    f"{self.where}: {shown(info.name)} has the shape {list(info.shape)}; for this "
                    f"model it has to be {list(wanted)}, with a rank of at least 1"
                )

    def _extra_leaves(self) -> set[str]:
        """Return the tensors beside A and B that the configuration expects."""
        options = {MAGNITUDE: self.config.use_dora, BIAS: self.config.lora_bias}
        return {leaf for leaf, expected in options.items() if expected}

    def _need(self, leaves: set[str], may: Iterable[str] = ()) -> None:
        have = self.group.infos.keys()
        if missing := sorted(leaves - have):
            raise self._missing(missing)
        if extra := sorted(have - leaves - set(may)):
            raise self._error(f"{', '.join(extra)} has no meaning there")

    def _missing(self, leaves: list[str]) -> CheckpointError:
        says = [f"{key}=true" for leaf, key in EXPECTED_BY.items() if leaf in leaves]
        why = f", and {ADAPTER_CONFIG_NAME} says {', '.join(says)}" if says else ""
        return self._error(f"{', '.join(leaves)} is missing{why}")

    def _error(self, why: str) -> CheckpointError:
        return CheckpointError(self._why(why))

    def _why(self, why: str) -> str:
        have = [f"{info.name} {list(info.shape)}" for info in self.group.infos.values()]
        return f"{self.where}: {why}; of {shown(self.group.path)} it has\n{listed(have)}"


def warn_of_missing(expected: Iterable[str], loaded: Iterable[str], where: str) -> None:
    """Warn of modules and biases that a config names and the files have nothing for."""
    if lacking := sorted(set(expected) - set(loaded)):
        warnings.warn(
            f"{where} has no tensors for {len(lacking)} modules or biases that its configuration "
            f"targets, which stay as they are:\n{listed(lacking)}",
            IncompleteAdapterWarning,
            stacklevel=4,
        )
