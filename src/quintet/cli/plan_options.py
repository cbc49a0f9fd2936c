"""Options of `quintet plan` that say which devices there are and how they may share a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quintet.cli.settings import COUNT, COUNT_OR_NONE
from quintet.errors import InputError

if TYPE_CHECKING:
    from quintet.planning.devices import Device
    from quintet.planning.world import SplitLimits, World

Command = TypeVar("Command", bound=Callable[..., Any])
COUNTS = ("tp", "ep", "pp", "dp", "fsdp")
CACHES = ("float32", "bfloat16", "float16", "int8", "int6", "int4")


def world_options(command: Command) -> Command:
    """Add the options that say which devices there are and how they may share a model."""
    for option in (
        click.option(
            "--optimizer",
            type=click.Choice(["adamw", "muon"]),
            help="With --train.  [default: adamw]",
        ),
        click.option(
            "--gradients",
            type=click.Choice(["float32", "bfloat16"]),
            help="With --train, what they are kept in.  [default: float32]",
        ),
        click.option(
            "--part-rows",
            type=COUNT,
            help="With --train, rows of a group at once.  [default: 1]",
        ),
        click.option("--recompute", is_flag=True, help="With --train, layers keep their input."),
        click.option(
            "--sequence-parallel", is_flag=True, help="With --train, norms by slices of the tokens."
        ),
        click.option("--train", is_flag=True, help="Plan a training; --batch is of a step."),
        click.option(
            "--splits",
            type=COUNT_OR_NONE,
            default=4,
            show_default=True,
            help="How many other splits are listed.",
        ),
        click.option(
            "--redundant-experts",
            "redundant",
            type=COUNT_OR_NONE,
            default=0,
            help="Further copies of experts a layer.",
        ),
        click.option("--step-tokens", type=COUNT, help="Of a prompt at once.  [default: 2048]"),
        click.option(
            "--cache-dtype", type=click.Choice(CACHES), help="Of the cache.  [default: --dtype]"
        ),
        click.option("--max-pp", type=COUNT, help="At most so many stages."),
        click.option("--max-ep", type=COUNT, help="At most so many share experts."),
        click.option("--max-tp", type=COUNT, help="At most so many share a matrix."),
        click.option(
            "--dp-attention", is_flag=True, help="As --tp 1 --pp 1 with experts on all devices."
        ),
        click.option("--fsdp", type=COUNT, help="In training, groups that share parameters."),
        click.option("--dp", type=COUNT, help="Groups with rows of their own."),
        click.option("--pp", type=COUNT, help="Stages of layers."),
        click.option("--ep", type=COUNT, help="Devices that share the experts."),
        click.option("--tp", type=COUNT, help="Devices that share each matrix."),
        click.option(
            "--device",
            metavar="NAME[,KEY=VALUE…]",
            help="h100, a100, cpu, …, or `here`; with memory=, bandwidth=, flops=, link=, …",
        ),
        click.option("--world", metavar="NODESxDEVICES", help="Plan for many, as 2x8."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """The values of the options; None and empty if they are not given."""

    world: str | None
    device: str | None
    counts: Mapping[str, int]
    most: Mapping[str, int]
    dp_attention: bool
    cache_dtype: str | None
    step_tokens: int | None
    redundant: int
    splits: int
    train: bool
    recompute: bool
    sequence_parallel: bool
    part_rows: int | None
    gradients: str | None
    optimizer: str | None

    @classmethod
    def taken(cls, given: dict[str, Any]) -> "WorldOptions":
        """Take them out of a command's options."""
        counts = {name: given.pop(name) for name in COUNTS}
        most = {name: given.pop(f"max_{name}") for name in ("tp", "ep", "pp")}
        names = ("world", "device", "dp_attention", "cache_dtype", "step_tokens", "redundant")
        training = ("train", "recompute", "sequence_parallel", "part_rows", "gradients")
        rest = {name: given.pop(name) for name in (*names, *training, "optimizer", "splits")}
        return cls(
            counts={name: count for name, count in counts.items() if count is not None},
            most={name: count for name, count in most.items() if count is not None},
            **rest,
        )

    @property
    def is_requested(self) -> bool:
        """Whether a world is meant."""
        return self.world is not None or self.device is not None

    def check(self) -> None:
        """Refuse options that have no effect beside those given.

        Raises:
            InputError: there is one.
        """
        split = {f"--{name}": True for name in self.counts}
        split |= {f"--max-{name}": True for name in self.most}
        split["--dp-attention"] = self.dp_attention
        generating = {
            "--dp-attention": self.dp_attention,
            "--cache-dtype": self.cache_dtype,
            "--step-tokens": self.step_tokens,
            "--redundant-experts": self.redundant,
        }
        training = {
            "--fsdp": self.counts.get("fsdp"),
            "--recompute": self.recompute,
            "--sequence-parallel": self.sequence_parallel,
            "--part-rows": self.part_rows,
            "--gradients": self.gradients,
            "--optimizer": self.optimizer,
        }
        if not self.is_requested:
            _refuse(
                {**split, **generating, **training, "--train": self.train},
                "is about many devices: give --world and --device, as in --world 2x8 --device h100",
            )
        elif self.train:
            _refuse(generating, "is about generating; leave it out with --train")
        else:
            _refuse(training, "is about training; give --train, or leave it out")

    def limits(self, size: int) -> "SplitLimits":
        """Return the possible splits of `size` devices.

        Raises:
            InputError: options that say different things.
        """
        from quintet.planning.world import SplitLimits

        counts = dict(self.counts)
        if self.dp_attention:
            if set(counts) & {"tp", "ep", "pp", "dp"}:
                raise InputError(
                    "--dp-attention is --tp 1 --pp 1 --ep and --dp of all devices; leave those out"
                )
            counts = {"tp": 1, "pp": 1, "dp": size, "ep": size}
        return SplitLimits(tuple(counts.items()), tuple(self.most.items()))


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    if idle := [name for name, given in options.items() if given]:
        raise InputError(f"{idle[0]} {reason}")


def world_and_device(options: WorldOptions) -> "tuple[World, Device]":
    """Return all devices and each of them.

    Raises:
        InputError: there are no such.
    """
    from quintet.planning.devices import DEVICES, device
    from quintet.planning.world import World

    world = World.parse(options.world or "1")
    if options.device is None:
        raise InputError(f"--world {world} of what? Give --device: {', '.join(DEVICES)}, here")
    if options.device.partition(",")[0].strip() == "here":
        known = {**DEVICES, "here": _measured(world.per_node)}
        return world, device(options.device, known)
    return world, device(options.device)


def _measured(processes: int) -> "Device":
    """Measure the share of this machine that each of several processes has."""
    import torch

    from quintet.measurement.machine import gemm_peak, read_bandwidth
    from quintet.ops.device_memory import host_memory
    from quintet.planning.devices import DEVICES

    return replace(
        DEVICES["cpu"],
        name="here",
        memory=host_memory() // processes,
        bandwidth=read_bandwidth().bytes_per_second / processes,
        flops=gemm_peak(torch.float32) / processes,
        usable=0.9,
    )
