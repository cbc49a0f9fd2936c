"""One process or several: the ranks of a training, and their parts of the model."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from quintet.adapters.dividing import adapted_names, connect_adapters, with_adapters
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.init_on_meta import init_on_meta
from quintet.parallel.apply import cut
from quintet.parallel.context_parallel import Sequences
from quintet.parallel.fsdp import Root, divide
from quintet.parallel.launch import join, launched, own_device
from quintet.parallel.layout import ParallelLayout, Parts
from quintet.parallel.pipeline import Pipeline
from quintet.parallel.placement import table_of
from quintet.parallel.sequence_parallel import slice_tokens
from quintet.parallel.slices import ParameterSlices
from quintet.parallel.stage import leave_out
from quintet.parallel.stages import Stages, names_of_process, stages_to_run
from quintet.parallel.world import World
from quintet.training.adapting import whole_of
from quintet.training.config import TrainingConfig
from quintet.training.local_part import LocalPart
from quintet.training.objectives.compared import Running
from quintet.training.objectives.compared import run_local as run_here
from quintet.training.optimizers.layout import LOCAL, Layout
from quintet.training.parallel import ParallelSettings
from quintet.training.ranks import Alone, Ranks, Several


def joined(settings: ParallelSettings) -> Ranks:
    """Join the processes that a launcher started, or those that are joined already.

    Raises:
        SettingError: they are more, or fewer, than the settings divide something among.
        DistributedError: not all of them came in time.
    """
    # A group that the caller made is the caller's.
    is_initialized = dist.is_available() and dist.is_initialized()
    launch = launched()
    size = dist.get_world_size() if is_initialized else 1 if launch is None else launch.size
    degrees = settings.degrees(size)
    if size == 1:
        return Alone()
    if is_initialized and launch is None:
        return Several(World.of(degrees, own_device()))
    return Several(join(degrees, timeout=settings.timeout))


def local_part(config: TrainingConfig, ranks: Ranks) -> LocalPart | None:
    """Return the part of a model that this process holds while it is built; None for all of it."""
    if not isinstance(ranks, Several) or (config.adapter and config.adapter.reads_weights):
        return None
    return LocalPart(ranks.world, _slices(ranks.world, every=_low(config)))


def _slices(world: World, *, every: bool) -> ParameterSlices | None:
    """Return the slices of the parts that tp and ep leave; None if they are not sliced."""
    sliced = world.degrees.fsdp > 1 or world.degrees.ep > world.degrees.tp
    return ParameterSlices(world, every=every) if sliced else None


def parallelize(
    model: CausalLMHead, config: TrainingConfig, ranks: Ranks, *, part: bool = False
) -> Layout:
    """Make a model this process's part of it, and return where all of it lies.

    Args:
        model: the whole, or what `held` says of it.
        config: the settings.
        ranks: the processes.
        part: whether it is not the whole.

    Raises:
        InputError: it cannot be divided so.
    """
    if not isinstance(ranks, Several):
        return LOCAL
    world, degrees = ranks.world, ranks.world.degrees
    low = _low(config)
    # Before it is cut: what is elsewhere is not known of a part.
    whole = whole_of(model) if degrees.pp > 1 else None
    by_tokens = config.parallel.sequence_parallel and degrees.tp > 1
    divided = _divided(model, world, part=part, low=low, by_tokens=by_tokens)
    model.world = _generating(world)
    # From here on processes draw for tokens, or layers, of their own.
    coordinates = world.coordinates
    index = (ranks.share[0] * degrees.cp + coordinates["cp"]) * degrees.pp + coordinates["pp"]
    if index:
        torch.manual_seed(config.train.seed + index)
    pipeline = None
    if divided.stages is not None:
        pipeline = Pipeline(model, divided.stages, world)
        if low and divided.root is not None:
            pipeline.stage.dtype = torch.bfloat16
    return ParallelLayout(
        model,
        world,
        divided.parts,
        divided.root,
        low=low,
        pipeline=pipeline,
        whole_model=whole,
        partial=divided.partial,
    )


class _Divided(NamedTuple):
    """A model after sharding.

    Attributes:
        parts: what of each tensor this process has, where tp or ep cut it.
        stages: which layers each has.
        root: what it is run through.
        partial: the parameters that learn from a slice of the tokens.
    """

    parts: Parts | None
    stages: Stages | None
    root: Root | None
    partial: tuple[str, ...]


def _divided(
    model: CausalLMHead,
    world: World,
    *,
    part: bool,
    low: bool = False,
    by_tokens: bool = False,
) -> _Divided:
    """Make a model this process's part of it.

    Where it is a part already, it is sliced, and connected, as far as it is not.
    """
    degrees, adapters = world.degrees, model.adapters
    parts = root = stages = None
    partial: tuple[str, ...] = ()
    whole = whole_of(model) if part or adapters is not None else model
    if degrees.pp > 1:
        stages = stages_to_run(whole, world)
    if max(degrees.tp, degrees.ep) > 1:
        table = with_adapters(whole, table_of(whole))
        if part:
            parts = Parts.of(whole, world, table)
            # Which are few numbers, and were put on it whole.
            cut(model, {name: parts.own[name] for name in adapted_names(model)})
        else:
            parts = Parts.cut(model, world, table)
        connect_adapters(model, table, world.groups.get("tp"), parts.own)
        if by_tokens:
            partial = slice_tokens(model, table, world).partial
    elif stages is not None and not part:
        leave_out(model, stages, world)
    if adapters is not None:
        if (local_names := names_of_process(stages, world)) is not None:
            adapters.keep(model, local_names)
        adapters.install(model)
    if degrees.cp > 1:
        model.sequences = Sequences(model, world)
    if degrees.fsdp > 1 or degrees.ep > degrees.tp:
        decoder = model.base_model
        assert isinstance(decoder, DecoderModel)
        if low:
            # What is gathered in fewer bits are the masters.
            model.to(torch.float32)
        sliced = _sliced(model, parts) if part else {}
        adapted = adapted_names(model)
        root = divide(model, decoder.layers, world, low=low, sliced=sliced, whole=adapted)
    return _Divided(parts, stages, root, partial)


@dataclass(frozen=True, slots=True)
class ReferenceLoader:
    """Loads reference models, sharded like the trained one.

    Attributes:
        world: the processes.
    """

    world: World

    @property
    def local_part(self) -> LocalPart:
        """The part of another model that this process holds."""
        return LocalPart(self.world, _slices(self.world, every=False), learns=False)

    def placed(self, model: CausalLMHead, *, part: bool) -> Running:
        """Make a model this process's part of it, and return the function that runs its forwards.

        Raises:
            InputError: it cannot be divided so.
        """
        root = _divided(model, self.world, part=part).root
        # What of it is gathered once stays so, as it never changes.
        return run_here if root is None else root


def reference_loader(ranks: Ranks) -> ReferenceLoader | None:
    """Return the placement of models to compare with; None if each is whole here."""
    return ReferenceLoader(ranks.world) if isinstance(ranks, Several) else None


def _generating(world: World) -> World | None:
    """Return the processes that generate together; None if all do the same to the bit."""
    if world.degrees.ep > world.degrees.tp:
        # Experts round what is sent to them by what comes with it.
        everyone = dist.new_group(backend="gloo")
        return replace(world, groups={**world.groups, "model": everyone})
    return world if max(world.degrees.tp, world.degrees.pp) > 1 else None


def _low(config: TrainingConfig) -> bool:
    """Return whether weights are computed with in bfloat16."""
    return config.optimizer.precision == "bfloat16"


def _sliced(model: CausalLMHead, parts: Parts | None) -> dict[str, tuple[int, ...]]:
    """Return the whole shapes of sliced parameters, by their first names."""
    if parts is None:
        shell = init_on_meta(type(model), model.config)
        shapes = {name: tuple(p.shape) for name, p in shell.named_parameters()}
    else:
        shapes = {name: shard.local_shape for name, shard in parts.own.items()}
    named = model.named_parameters()
    return {n: shapes[n] for n, p in named if n in shapes and shapes[n] != tuple(p.shape)}
