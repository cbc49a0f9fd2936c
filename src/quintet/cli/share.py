"""The memory of one process of a sharded, served model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quintet.cli.output import size_of
from quintet.cli.together import follows, least

if TYPE_CHECKING:
    import torch

    from quintet.configuration import PreTrainedConfig
    from quintet.parallel.division import DistributedConfig
    from quintet.planning.inference import Footprint, Workload
    from quintet.serving import Limits

# How many tokens of prompts are counted as being worked on at once.
PIECE = 512


def room_together() -> int:
    """Return the bytes of the process with the least; all processes have to call this."""
    from quintet.ops.device_memory import free_memory
    from quintet.parallel.launch import launched, own_device

    launch, device = launched(), own_device()
    assert launch is not None, "there are several"
    # A machine's is that of all its processes.
    return least(free_memory(device) // (launch.local_size if device.type == "cpu" else 1))


def share_of(
    config: "PreTrainedConfig",
    sizes: Mapping[str, int],
    count: int,
    work: "Workload",
    dtype: "torch.dtype",
    quantize: str | None = None,
) -> "Footprint":
    """Return the memory of the process with the largest share of a model and its rows.

    Args:
        sizes: tp_size, ep_size and pp_size, as far as they were said.
        count: of processes.

    Raises:
        InputError: it cannot be divided so.
    """
    from quintet.parallel.division import degrees_for
    from quintet.parallel.launch import own_device
    from quintet.planning.devices import device
    from quintet.planning.inference import footprint
    from quintet.planning.plans import described
    from quintet.planning.weights import on_meta
    from quintet.planning.world import Split

    degrees = degrees_for(on_meta(config, dtype), _degrees(sizes), count)
    kind = device("cpu" if own_device().type == "cpu" else "h100")
    model, _ = described(config, kind, dtype=dtype, quantize=quantize)
    groups = degrees.dp * degrees.fsdp
    split = Split(tp=degrees.tp, ep=degrees.ep, pp=degrees.pp, dp=groups)
    # Each of the groups with texts of their own has as many rows.
    return footprint(model, split, replace(work, rows=work.rows * groups))


def own_group(path: str, given: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the index of this process's group of texts, and whether it leads the group.

    Args:
        path: of the model.
        given: the command's options.
        where: how it is found.

    Raises:
        InputError: the model cannot be divided so.
        QuintetError: whatever keeps its configuration from being read.
    """
    import torch

    from quintet.auto import AutoConfig
    from quintet.parallel.division import degrees_for, processes
    from quintet.parallel.faults import watch
    from quintet.planning.weights import on_meta

    watching = watch()
    if given["ep"] is None or watching is None:
        return 0, not follows()
    config = AutoConfig.from_pretrained(path, **where)
    sizes = {f"{name}_size": given[name] for name in ("tp", "ep", "pp")}
    degrees = degrees_for(on_meta(config, torch.bfloat16), _degrees(sizes), processes())
    coordinates = degrees.coordinates(watching.rank)
    return coordinates["fsdp"], coordinates["tp"] == coordinates["pp"] == 0


def _degrees(sizes: Mapping[str, int]) -> "DistributedConfig":
    from quintet.parallel.division import DistributedConfig

    tp, ep, pp = (sizes.get(f"{name}_size") for name in ("tp", "ep", "pp"))
    return DistributedConfig(tp_size=tp, ep_size=ep, pp_size=pp)


def too_large_together(
    config: "PreTrainedConfig",
    given: Mapping[str, Any],
    limits: "Limits",
    bits: int | None,
    *,
    predicts: bool = False,
) -> str | None:
    """Return why a part of a model and of its rows does not fit a process; None if it does.

    Raises:
        InputError: the model cannot be divided so.
    """
    import torch

    from quintet.modeling.placement import named_dtype
    from quintet.parallel.division import processes
    from quintet.planning.inference import Workload

    room, dtype = room_together(), given["dtype"]
    computed = config.torch_dtype or torch.bfloat16 if dtype == "auto" else named_dtype(dtype)
    cache_dtype = str(computed).removeprefix("torch.") if bits is None else f"int{bits}"
    work = Workload(limits.capacity, limits.rows, PIECE, computed.itemsize, cache_dtype, predicts)
    sizes = {f"{name}_size": given[name] for name in ("tp", "ep", "pp") if given[name] is not None}
    need = share_of(config, sizes, processes(), work, computed, given["quantize"])
    if need.total <= room:
        return None
    return (
        f"each process needs {size_of(need.total)} ({size_of(need.weights)} for its part of the "
        f"weights, {size_of(need.cache)} for that of the rows), and the one with the least has "
        f"{size_of(room)}; start more processes"
    )
