"""The split to use and the others that fit, or the reason why none does, and remedies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from quintet.configuration import PreTrainedConfig
from quintet.errors import DoesNotFitError, InputError
from quintet.planning.communication import Network
from quintet.planning.devices import Device
from quintet.planning.inference import (
    DecodePace,
    Footprint,
    Workload,
    decode,
    footprint,
    prefill,
)
from quintet.planning.shares import PlannedModel
from quintet.planning.training import Training, TrainingFootprint, step, training_footprint
from quintet.planning.weights import Tensors, on_meta, quantization_on, weights_of
from quintet.planning.world import Split, SplitLimits, World, splits
from quintet.quantization.config import QuantizationConfig

# The most nodes that are tried where fewer are too few, as a multiple of those there are.
MOST_NODES = 64


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """A split to generate by, with its memory and pace.

    Attributes:
        split: the split.
        memory: of the device that needs the most.
        room: the bytes that a device is planned with.
        prefill: how fast prompts are read.
        decode: how fast answers are made by the rows asked for.
        rows: how many rows of the context all groups have room for.
        full: how fast answers are made by so many.
    """

    split: Split
    memory: Footprint
    room: int
    prefill: DecodePace
    decode: DecodePace
    rows: int
    full: DecodePace | None

    @property
    def pace(self) -> DecodePace:
        """The key by which splits are compared."""
        return self.decode

    @property
    def tokens(self) -> int:
        """The number of tokens that the cache of one group has room for."""
        return self.memory.tokens_in(self.room - self.memory.weights - self.memory.working)


@dataclass(frozen=True, slots=True)
class TrainingChoice:
    """A split to train by, with its memory; as a `SplitChoice`, with the pace of a step."""

    split: Split
    memory: TrainingFootprint
    room: int
    pace: DecodePace


AnyChoice = TypeVar("AnyChoice", SplitChoice, TrainingChoice)


@dataclass(frozen=True, slots=True)
class Plan(Generic[AnyChoice]):
    """A model's requirements in a world.

    Attributes:
        model: what is planned.
        quantized: how its matrices are held; None for plain numbers.
        world: all devices.
        device: each of them.
        choices: splits that fit, the best first.
        nearest: the split that needs the least memory.
        misfits: why others are none, each reason once with a split of which it holds.
        remedies: what would fit where nothing does, in words of the command line.
    """

    model: PlannedModel
    quantized: QuantizationConfig | None
    world: World
    device: Device
    choices: Sequence[AnyChoice]
    nearest: AnyChoice
    misfits: Mapping[str, Split]
    remedies: Sequence[str]

    @property
    def best(self) -> AnyChoice | None:
        """The split to use; None if none fits."""
        return self.choices[0] if self.choices else None

    def require(self) -> AnyChoice:
        """Return the split to use.

        Raises:
            DoesNotFitError: none fits; the message says what would.
        """
        if self.choices:
            return self.choices[0]
        need, room = self.nearest.memory.total, self.nearest.room
        advice = f"; it would with {', or '.join(self.remedies)}" if self.remedies else ""
        raise DoesNotFitError(
            f"no split fits: with {self.nearest.split} a device needs {need / 1e9:.2f} GB, and "
            f"{room / 1e9:.2f} GB of each {self.device.name} can be planned with{advice}"
        )


def described(
    config: PreTrainedConfig,
    device: Device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    tensors: Tensors | None = None,
    redundant: int = 0,
) -> tuple[PlannedModel, QuantizationConfig | None]:
    """Return a model as it would be held on a device, from its config.

    Args:
        config: the model's.
        device: what holds it.
        dtype: of plain numbers.
        quantize: how matrices are to be held; None for as its files are.
        tensors: of its files, where they were looked at.
        redundant: copies of routed experts in each layer besides.
    """
    request = quantization_on(config, quantize, device)
    as_files = tensors if quantize is None else None
    weights = weights_of(on_meta(config, dtype), request, as_files)
    return PlannedModel(config, weights, redundant), request.target


def plan_inference(
    config: PreTrainedConfig,
    world: World,
    device: Device,
    work: Workload,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    tensors: Tensors | None = None,
    limits: SplitLimits | None = None,
    redundant: int = 0,
) -> Plan[SplitChoice]:
    """Plan generation in a world: its memory, its pace, and the split of the model over it.

    Args:
        config: the model's.
        world: all devices.
        device: each of them.
        work: what is asked.
        dtype: of numbers that are not quantised.
        quantize: how matrices are to be held; None for as the model's files are.
        tensors: of the files, where they were looked at.
        limits: which splits are thought of.
        redundant: copies of routed experts in each layer besides.

    Raises:
        InputError: no split is one of those that `limits` allows, or the model cannot be split so.
    """

    def model_in(form: str | None) -> tuple[PlannedModel, QuantizationConfig | None]:
        return described(
            config, device, dtype=dtype, quantize=form, tensors=tensors, redundant=redundant
        )

    def tried(model: PlannedModel, world: World, work: Workload) -> _Tried[SplitChoice]:
        network = Network(world, device)

        def choose(split: Split) -> SplitChoice:
            return _choice(model, split, device, work, network)

        return _try(
            choose, world, limits or SplitLimits(), experts=bool(model.experts), train=False
        )

    model, stored = model_in(quantize)

    def remedies() -> Iterator[str]:
        for form in _smaller(quantize, stored, device):
            if tried(model_in(form)[0], world, work).fit:
                yield f"--quantize {form}"
                break
        few = replace(work, cache_dtype="int8")
        if not work.cache_dtype.startswith("int") and tried(model, world, few).fit:
            yield "--cache-dtype int8"
        for rows in _halves(work.rows, 1):
            if tried(model, world, replace(work, rows=rows)).fit:
                yield f"--batch {rows}"
                break
        for context in _halves(work.context, 128):
            if tried(model, world, replace(work, context=context)).fit:
                yield f"--context {context}"
                break
        for larger in _grown(world):
            if tried(model, larger, work).fit:
                yield f"--world {larger}"
                break

    return _plan(model, stored, world, device, tried(model, world, work), remedies)


def plan_training(
    config: PreTrainedConfig,
    world: World,
    device: Device,
    work: Training,
    *,
    limits: SplitLimits | None = None,
) -> Plan[TrainingChoice]:
    """Plan training in a world: its memory, its pace, and the split of the model over it.

    Args:
        config: the model's; it is trained in plain numbers.
        world: all devices.
        device: each of them.
        work: what is trained, and how.
        limits: which splits are thought of.

    Raises:
        InputError: no split is one of those that `limits` allows, or the model cannot be split so.
    """
    model, _ = described(config, device, quantize="none")

    def tried(world: World, work: Training) -> _Tried[TrainingChoice]:
        network = Network(world, device)

        def choose(split: Split) -> TrainingChoice:
            memory = training_footprint(model, split, work)
            return TrainingChoice(split, memory, device.room, step(model, split, work, network))

        return _try(choose, world, limits or SplitLimits(), experts=bool(model.experts), train=True)

    def remedies() -> Iterator[str]:
        if not work.recompute and tried(world, replace(work, recompute=True)).fit:
            yield "--recompute"
        if not work.sequence_parallel and tried(world, replace(work, sequence_parallel=True)).fit:
            yield "--sequence-parallel"
        for rows in _halves(work.part_rows, 1):
            if tried(world, replace(work, part_rows=rows)).fit:
                yield f"--part-rows {rows}"
                break
        if work.optimizer == "adamw" and tried(world, replace(work, optimizer="muon")).fit:
            yield "--optimizer muon"
        for larger in _grown(world):
            if tried(larger, replace(work, rows=max(work.rows, larger.size))).fit:
                yield f"--world {larger}"
                break

    return _plan(model, None, world, device, tried(world, work), remedies)


@dataclass(frozen=True, slots=True)
class _Tried(Generic[AnyChoice]):
    found: Sequence[AnyChoice]
    misfits: Mapping[str, Split]

    @property
    def fit(self) -> Sequence[AnyChoice]:
        """The splits that fit, best first: of equal pace, fewer stages, and whole experts."""
        return sorted(
            (one for one in self.found if one.memory.total <= one.room),
            key=lambda one: (-one.pace.tokens_per_second, one.split.pp, -one.split.ep),
        )


def _try(
    choose: Callable[[Split], AnyChoice],
    world: World,
    limits: SplitLimits,
    *,
    experts: bool,
    train: bool,
) -> _Tried[AnyChoice]:
    found: list[AnyChoice] = []
    misfits: dict[str, Split] = {}
    for split in splits(world, limits, experts=experts, train=train):
        try:
            found.append(choose(split))
        except InputError as reason:
            misfits.setdefault(str(reason), split)
    return _Tried(found, misfits)


def _plan(
    model: PlannedModel,
    stored: QuantizationConfig | None,
    world: World,
    device: Device,
    tried: _Tried[AnyChoice],
    remedies: Callable[[], Iterator[str]],
) -> Plan[AnyChoice]:
    if not tried.found:
        raise InputError(_nothing(world, tried.misfits))
    fit = tried.fit
    nearest = min(tried.found, key=lambda one: one.memory.total)
    remedies_found = [] if fit else list(remedies())
    return Plan(model, stored, world, device, fit, nearest, tried.misfits, remedies_found)


def _choice(
    model: PlannedModel, split: Split, device: Device, work: Workload, network: Network
) -> SplitChoice:
    memory = footprint(model, split, work)
    left = device.room - memory.weights - memory.working
    rows = memory.rows_in(left, work.context) * split.groups
    full = decode(model, split, replace(work, rows=rows), network) if rows else None
    return SplitChoice(
        split,
        memory,
        device.room,
        prefill(model, split, work, network),
        decode(model, split, work, network),
        rows,
        full,
    )


def _smaller(quantize: str | None, stored: QuantizationConfig | None, device: Device) -> list[str]:
    """Return the formats that take fewer bytes than the one there is."""
    forms = ["fp8", "int8", "int4"] if device.fp8 else ["int8", "int4"]
    if quantize in forms:
        return forms[forms.index(quantize) + 1 :]
    return forms if stored is None else ["int4"]


def _halves(number: int, least: int) -> Iterator[int]:
    while number > least:
        number //= 2
        yield number


def _grown(world: World) -> Iterator[World]:
    factor = 2
    while factor <= MOST_NODES:
        yield world.grown(factor)
        factor *= 2


def _nothing(world: World, misfits: Mapping[str, Split]) -> str:
    if not misfits:
        return (
            f"no split of {world} has the numbers that were asked for: tp times pp times dp (and "
            f"fsdp) is {world.size}, and ep divides tp times dp; ask for fewer of them"
        )
    reasons = "; ".join(list(misfits)[:3])
    return f"no split of {world} goes: {reasons}"
