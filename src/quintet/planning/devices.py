"""Published specifications of devices, with their sources.

Bandwidths are bytes a second in one direction. A link is what one device has to the others of its
node, a network what it has to other nodes: makers sell both directions together, so of theirs this
is half. Products are dense, without sparsity, in bfloat16 and FP8 with sums in float32. What a
program reaches of any of them is less.

Sources: the data sheets of NVIDIA A100 (DA-06762), H100 (2430615), H200, HGX B200, L4, L40S and
AMD MI300X; V3 §3.2.2 for the H800, whose links are cut (160 GB/s reached, 50 of the network).
Networks are what the makers' own systems have beside each GPU: 200 Gb/s beside an A100 (DGX A100),
400 beside a Hopper or a B200 (DGX H100, H200, B200), 100 beside cards in a PCIe slot; nine tenths
of it reach the program, which makes 45 GB/s of 400 Gb/s, as DeepEP's tables have it for large
messages. Latencies are those of one small message among NCCL's tests on such systems, about 5 µs
within a node and 20 across.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from quintet.checkpoint import parse_size
from quintet.errors import InputError, shown


@dataclass(frozen=True, slots=True)
class Link:
    """The link from a device to others.

    Attributes:
        bandwidth: bytes a second, in one direction.
        latency: seconds until the first byte is there.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True)
class Device:
    """One of the devices of a world.

    Attributes:
        name: what it is called.
        memory: its bytes.
        bandwidth: bytes of it that are read a second.
        flops: operations a second of a product of bfloat16 matrices.
        fp8: the same of FP8; None if it multiplies no FP8.
        link: to the other devices of its node.
        network: to devices of other nodes.
        usable: the share of its memory that is planned with; the rest is the runtime's, the
            libraries' buffers and what lies between allocations.
        reached: the share of `flops` that large products reach.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    fp8: float | None
    link: Link
    network: Link
    usable: float = 0.9
    reached: float = 0.5

    @property
    def room(self) -> int:
        """The bytes that are planned with."""
        return int(self.memory * self.usable)


NODE, ACROSS = 5e-6, 20e-6
NVLINK3, NVLINK4, NVLINK5 = (Link(half, NODE) for half in (300e9, 450e9, 900e9))
PCIE4, PCIE5 = Link(25e9, 10e-6), Link(50e9, 10e-6)
GBIT100, GBIT200, GBIT400 = (Link(0.9 * bits / 8, ACROSS) for bits in (100e9, 200e9, 400e9))
# Two processes of one CPU hand bytes over through memory, those of two hosts by Ethernet.
HOST, ETHERNET = Link(0.5e9, 0.3e-3), Link(1.1e9, 0.5e-3)
GB = 10**9

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        one.name: one
        for one in (
            Device("a100", 80 * GB, 2.039e12, 312e12, None, NVLINK3, GBIT200),
            Device("a100-40gb", 40 * GB, 1.555e12, 312e12, None, NVLINK3, GBIT200),
            Device("h100", 80 * GB, 3.35e12, 989e12, 1979e12, NVLINK4, GBIT400),
            Device("h800", 80 * GB, 3.35e12, 989e12, 1979e12, Link(160e9, NODE), GBIT400),
            Device("h200", 141 * GB, 4.8e12, 989e12, 1979e12, NVLINK4, GBIT400),
            Device("h20", 96 * GB, 4.0e12, 148e12, 296e12, NVLINK4, GBIT400),
            Device("b200", 180 * GB, 7.7e12, 2250e12, 4500e12, NVLINK5, GBIT400),
            Device("mi300x", 192 * GB, 5.3e12, 1307e12, 2615e12, Link(448e9, NODE), GBIT400),
            Device("l40s", 48 * GB, 0.864e12, 362e12, 733e12, PCIE4, GBIT100),
            Device("l4", 24 * GB, 0.3e12, 121e12, 242e12, PCIE4, GBIT100),
            Device("rtx4090", 24 * GB, 1.008e12, 165e12, 330e12, PCIE4, ETHERNET),
            # A server of one socket with eight channels of DDR5; --device cpu,memory=… for others.
            Device("cpu", 64 * GB, 0.2e12, 2e12, None, HOST, ETHERNET, usable=0.8),
        )
    }
)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgtp]?)(?:b/s|flops|flop/s)?", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ns|us|µs|ms|s)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBERS = ("memory", "bandwidth", "flops", "fp8", "link", "network", "usable", "reached")
_LATENCIES = ("link-latency", "network-latency")


def device(text: str, devices: Mapping[str, Device] = DEVICES) -> Device:
    """Return a device by its name, and with other numbers where they are given.

    `h100` is what the makers say of one, `h100,memory=96GB,network=25GB/s` another of its kind.

    Args:
        text: a name, then KEY=VALUE behind commas: memory, bandwidth, flops, fp8 (or fp8=none),
            link, network, link-latency, network-latency, usable, reached.
        devices: those that names are of.

    Raises:
        InputError: no such device or key, or a value that is none.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name.lower() not in devices:
        raise InputError(
            f"there is no device {shown(name)}; there are {', '.join(devices)}. Another one is one "
            "of them with its own numbers, as in h100,memory=96GB,bandwidth=4TB/s"
        )
    found = devices[name.lower()]
    for change in changes:
        key, equals, value = (part.strip() for part in change.partition("="))
        if not equals or key not in (*_NUMBERS, *_LATENCIES):
            raise InputError(
                f"{shown(change)} changes nothing of a device; write KEY=VALUE with one of "
                f"{', '.join((*_NUMBERS, *_LATENCIES))}"
            )
        found = _changed(found, key, value)
    return replace(found, name=text) if changes else found


def _changed(before: Device, key: str, value: str) -> Device:
    new: dict[str, Any] = {}
    side = key.partition("-")[0]
    if key in ("link", "network"):
        new[side] = replace(_link(before, side), bandwidth=_rate(key, value))
    elif key in _LATENCIES:
        new[side] = replace(_link(before, side), latency=_seconds(key, value))
    elif key == "memory":
        new[key] = parse_size(value)
    elif key in ("usable", "reached"):
        new[key] = _share(key, value)
    elif key == "fp8" and value == "none":
        new[key] = None
    else:
        new[key] = _rate(key, value)
    return replace(before, **new)


def _link(device: Device, side: str) -> Link:
    return device.link if side == "link" else device.network


def _rate(key: str, value: str) -> float:
    found = _RATE.fullmatch(value)
    if not found or not float(found[1]):
        raise InputError(
            f"{key}={shown(value)} has to be a number a second such as 3.35TB/s, 450G or 989T"
        )
    return float(found[1]) * _UNITS[found[2].lower()]


def _seconds(key: str, value: str) -> float:
    found = _TIME.fullmatch(value)
    if not found:
        raise InputError(f"{key}={shown(value)} has to be a time such as 5us or 0.3ms")
    return float(found[1]) * _SECONDS[found[2]]


def _share(key: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{key}={shown(value)} has to be a share, above 0 and at most 1")
    return share
