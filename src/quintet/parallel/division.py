"""The division of a model among processes: as requested, or as far as it goes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from quintet.errors import InputError, shown
from quintet.parallel.placement import place, table_of
from quintet.parallel.world import Degrees, environment_size

__all__ = ["PLAN", "DistributedConfig", "degrees_for", "processes", "requested_division"]

# Of a mesh, from the outermost.
AXES = ("pp", "dp", "fsdp", "tp")
PLAN = "each layer says itself how it is cut; give sizes alone"
# Of Transformers' options, those that do not exist here, and why.
REFUSED = {
    "ep_plan": PLAN,
    "fsdp_plan": PLAN,
    "fsdp_size": "slices of weights are for training: `quintet train`, or quintet.training",
    "fsdp_cpu_offload": "slices of weights are for training: `quintet train`, or quintet.training",
    "fsdp_mixed_precision": "dtype= says in which numbers a model computes",
    "enable_sequence_parallel": "tokens of a sequence are divided in training alone",
}


@dataclass(frozen=True, slots=True)
class DistributedConfig:
    """The requested division of a model among processes, by Transformers' names.

    Without any size the model is divided as far as its heads, blocks and experts allow.

    Attributes:
        tp_size: the matrices of layers; what the others leave if not given.
        tp_plan: "auto", or None.
        ep_size: the experts, whole ones, or without it parts of each: among the processes of tp;
            more than these are among several groups of them, each with texts of its own.
        pp_size: the layers.
        dp_replicate_size: copies of the model, each for texts of its own.
        ep_implementation: "auto" or "all_reduce": each process runs its experts on all tokens.
        enable_expert_parallel: the older way to say that ep_size is tp_size.
        timeout: seconds that processes wait for each other; QUINTET_DISTRIBUTED_TIMEOUT, or five
            minutes, if not given.
        expert_seats: where which experts are, if not one after the other: for each stack of
            experts, which one is at each seat (`quintet.parallel.expert_seats.balanced`).

    Raises:
        InputError: a size is none, or one of Transformers' options that do not exist here is set.
    """

    tp_size: int | None = None
    tp_plan: Mapping[str, str] | Literal["auto"] | None = None
    enable_sequence_parallel: bool = False
    enable_expert_parallel: bool = False
    fsdp_size: int | None = None
    dp_replicate_size: int | None = None
    fsdp_plan: Mapping[str, str] | None = None
    fsdp_cpu_offload: bool = False
    fsdp_mixed_precision: bool = False
    pp_size: int | None = None
    ep_size: int | None = None
    ep_plan: Mapping[str, str] | None = None
    ep_implementation: str = "auto"
    timeout: float | None = None
    expert_seats: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size"):
            size = asdict(self)[name]
            if size is not None and (not isinstance(size, int) or size < 1):
                raise InputError(f"{name}={shown(size)} has to be a number of processes")
        if self.tp_plan not in (None, "auto"):
            raise InputError(f"tp_plan={shown(self.tp_plan)} has to be 'auto': {PLAN}")
        for name, why in REFUSED.items():
            if asdict(self)[name] not in (None, False, 1):
                raise InputError(f"{name}={shown(asdict(self)[name])} is not here: {why}")
        if self.ep_implementation not in ("auto", "all_reduce"):
            raise InputError(
                f"ep_implementation={shown(self.ep_implementation)} has to be 'auto' or "
                "'all_reduce': each process runs its experts on all tokens, and they are added up"
            )

    @classmethod
    def of(cls, given: object) -> "DistributedConfig":
        """Read a config: an instance, Transformers' class, or a mapping of their names.

        Raises:
            InputError: it is none of these, or has a name that does not exist.
        """
        if isinstance(given, cls):
            return given
        if is_dataclass(given) and not isinstance(given, type):
            given = asdict(given)
        if not isinstance(given, Mapping):
            raise InputError(
                f"distributed_config={shown(given)} has to be a DistributedConfig, or a mapping"
            )
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(f"{name}_size", known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise InputError(f"distributed_config has no {shown(name)}; {hint}")
        # Transformers counts one of everything that was not asked for.
        return cls(**given)


def processes() -> int:
    """Return the number of processes in the script's group, or started by a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return environment_size()


def requested_division(
    tp_plan: object,
    tp_size: int | None,
    device_mesh: DeviceMesh | None,
    distributed_config: object,
    *,
    auto: bool,
) -> DistributedConfig | None:
    """Return the requested division of a model; None if this process is to have all of it.

    Args:
        auto: whether it is to go wherever there is room: on all processes of a launcher.

    Raises:
        InputError: options that say two things, a mesh that is not in order, or more processes
            than there are.
    """
    given = {
        "distributed_config": distributed_config,
        "device_mesh": device_mesh,
        "tp_plan or tp_size": tp_plan if tp_size is None else tp_size,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} say the same thing twice; give one of them")
    count = processes()
    if distributed_config is not None:
        config = DistributedConfig.of(distributed_config)
    elif device_mesh is not None:
        config = _of_mesh(device_mesh)
    elif named or (auto and environment_size() > 1):
        config = DistributedConfig(tp_plan=tp_plan, tp_size=tp_size)  # type: ignore[arg-type]
    else:
        return None
    if count > 1:
        return config
    sizes = {name: asdict(config)[name] or 1 for name in ("tp_size", "pp_size", "ep_size")}
    if too_many := [f"{name}={size}" for name, size in sizes.items() if size > 1]:
        raise InputError(
            f"{', '.join(too_many)}: there is one process; start as many by torchrun "
            "--nproc-per-node N, and run the same script in all"
        )
    return None


def _of_mesh(mesh: DeviceMesh) -> DistributedConfig:
    """Return the sizes of a mesh, whose dimensions are named as the axes are."""
    if not isinstance(mesh, DeviceMesh):
        raise InputError(f"device_mesh={shown(mesh)} has to be a DeviceMesh")
    names = mesh.mesh_dim_names or ("tp",)
    sizes = dict(zip(names, mesh.mesh.shape, strict=True)) if len(names) == mesh.ndim else {}
    ordered = [name for name in AXES if name in sizes]
    if not sizes or ordered != list(names):
        raise InputError(
            f"device_mesh has dimensions {names}; they have to be among {', '.join(AXES)}, in "
            "this order. Experts are divided among the processes of tp: "
            "distributed_config=DistributedConfig(tp_size=…, ep_size=…)"
        )
    ranks = mesh.mesh.flatten().tolist()
    if ranks != list(range(processes())):
        raise InputError(
            f"device_mesh holds ranks {shown(ranks)}; they have to be all {processes()} processes, "
            "in order"
        )
    return DistributedConfig(
        tp_size=sizes.get("tp", 1),
        pp_size=sizes.get("pp"),
        dp_replicate_size=sizes.get("dp"),
        fsdp_size=sizes.get("fsdp"),
    )


def degrees_for(model: nn.Module, config: DistributedConfig, count: int) -> Degrees:
    """Return the degrees by which `count` processes divide a model.

    Args:
        model: whole; it needs no memory.
        config: what was asked for.
        count: of processes.

    Raises:
        InputError: the processes are no such number, what has to stay whole cannot be given out
            among them.
    """
    pp, dp = config.pp_size or 1, config.dp_replicate_size or 1
    if count % (pp * dp):
        raise InputError(
            f"pp_size={pp} · dp_replicate_size={dp} has to divide the number of processes, {count}"
        )
    rest, ep = count // (pp * dp), config.ep_size
    tp = config.tp_size or max(n for n in range(1, rest + 1) if rest % n == 0 and _fits(model, n))
    if ep is not None and ep > tp:
        _check_exchange(model, ep, tp, pp)
        return Degrees(tp=tp, ep=ep, fsdp=ep // tp, dp=dp)
    if config.tp_size is None and tp < rest:
        # What is left divides the layers, which takes their turns and is no faster.
        if config.pp_size is not None:
            raise InputError(
                f"{rest} processes cannot divide this model among them: {_why(model, rest)}"
            )
        pp = rest // tp
    if ep is None and _experts(model) and (config.enable_expert_parallel or not config.tp_size):
        ep = max(n for n in range(1, tp + 1) if tp % n == 0 and _fits(model, tp, n))
    return Degrees(tp=tp, ep=ep or 1, pp=pp, dp=dp)


def _check_exchange(model: nn.Module, ep: int, tp: int, pp: int) -> None:
    """Check that experts can be among processes with texts of their own.

    Raises:
        InputError: they cannot.
    """
    beyond = f"ep_size={ep} is more than tp_size={tp}, so that tokens are sent to experts"
    if not _experts(model):
        raise InputError(f"{beyond}, and this model has none; leave ep_size out")
    if pp > 1:
        raise InputError(
            f"{beyond}, and the stages of pp_size={pp} are at different tokens; leave pp_size out"
        )
    if ep % tp:
        raise InputError(f"{beyond} among groups of tp: it has to be a multiple of tp_size")


def _experts(model: nn.Module) -> bool:
    cuts = table_of(model).parameters.values()
    return any(cut.axis == "ep" for of_one in cuts for cut in of_one)


def _fits(model: nn.Module, tp: int, ep: int = 1) -> bool:
    return _why(model, tp, ep) is None


def _why(model: nn.Module, tp: int, ep: int = 1) -> str | None:
    """Return why a model cannot be divided among so many processes; None if it can."""
    saved = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(saved.items())}
    shapes = {name: tuple(saved[name].shape) for name in first.values()}
    try:
        place(shapes, table_of(model), Degrees(tp=tp, ep=ep).place(0))
    except InputError as error:
        return str(error)
    return None
