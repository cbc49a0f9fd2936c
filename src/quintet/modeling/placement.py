"""The dtype of a model, and the device of each of its parts."""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from quintet.checkpoint import parse_size
from quintet.configuration.base import FLOAT_DTYPES
from quintet.errors import DoesNotFitError, InputError, UnsupportedBackendError, shown
from quintet.ops.device_memory import free_memory

Device = str | int | torch.device
DeviceMap = Device | Mapping[str, Device] | None
MaxMemory = Mapping[int | str, int | str]

STRATEGIES = ("auto", "balanced", "sequential")
# How much of the memory that is free on a device weights may take where nobody says it: the rest is
# for activations and the cache.
SHARE = 0.9


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point dtype, given itself or its name.

    Raises:
        InputError: it is not one that weights can have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        near = difflib.get_close_matches(name, FLOAT_DTYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"dtype={shown(dtype)} has to be 'auto' or one of {FLOAT_DTYPES}{hint}")
    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A part that is placed as a whole: the embedding, a layer, a norm, a head."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of each part; the longest matching prefix of a name decides."""

    devices: Mapping[str, torch.device]

    @property
    def several(self) -> bool:
        """Whether parts are on more than one device."""
        return len(set(self.devices.values())) > 1

    def device_of(self, name: str) -> torch.device:
        """Return the device of a parameter or module by name.

        Raises:
            InputError: no path covers it.
        """
        while True:
            if name in self.devices:
                return self.devices[name]
            if not name:
                raise InputError(f"device_map says nothing of {name!r}")
            name = name.rpartition(".")[0]

    def in_words(self, model_parts: Sequence[ModelPart]) -> str:
        """Format the bytes of weights per device, in forward order."""
        given: dict[torch.device, int] = {}
        for part in model_parts:
            device = self.device_of(part.path)
            given[device] = given.get(device, 0) + part.nbytes
        return ", ".join(f"{gigabytes(size)} on {device}" for device, size in given.items())

    def covers(self, name: str) -> bool:
        """Return whether a path is a prefix of the name."""
        return any(path in ("", name) or name.startswith(f"{path}.") for path in self.devices)


def parts(model: nn.Module, dtype: torch.dtype, fp32: tuple[str, ...] = ()) -> list[ModelPart]:
    """Return the parts of a model in forward order, with their bytes in a dtype.

    What two parts share is counted with the first. `fp32` are ends of names kept in float32.
    """
    found = [path for path in _paths(model, "") if path]
    seen: set[int] = set()
    result = []
    for path in found:
        size = 0
        module = model.get_submodule(path)
        tensors = itertools.chain(module.named_parameters(path), module.named_buffers(path))
        for name, tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                plain = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                kept_dtype = torch.float32 if fp32 and name.endswith(fp32) else dtype
                size += tensor.numel() * (kept_dtype if plain else tensor.dtype).itemsize
        result.append(ModelPart(path, size))
    return result


def place(
    device_map: DeviceMap,
    model_parts: Sequence[ModelPart],
    max_memory: MaxMemory | None = None,
) -> Placement:
    """Choose the devices of a model's parts.

    `None` is torch's default device, -1 the CPU, "auto" as many GPUs as it takes (the CPU where
    there is none), "balanced" all of them evenly, "sequential" one after the other.

    Raises:
        UnsupportedBackendError: this machine does not have a device, or it is "disk".
        InputError: a mapping that leaves parts out or names others, or a wrong `max_memory`.
        DoesNotFitError: the devices have too little memory.
    """
    if isinstance(device_map, Mapping):
        return _mapped(device_map, model_parts)
    if device_map in STRATEGIES:
        capacity = _capacity(max_memory)
        if len(capacity) > 1 or max_memory:
            return Placement(layout(model_parts, capacity, str(device_map)))
        return Placement(MappingProxyType({"": next(iter(capacity))}))
    if max_memory is not None:
        raise InputError(
            f"max_memory goes with device_map in {STRATEGIES}, not with {device_map!r}"
        )
    return Placement(MappingProxyType({"": first_device(device_map)}))


def first_device(device_map: DeviceMap) -> torch.device:
    """Return the device a forward begins on, before the model is known.

    Raises:
        UnsupportedBackendError: this machine does not have a device that is named, or it is "disk".
    """
    if isinstance(device_map, Mapping):
        if not device_map:
            raise UnsupportedBackendError(
                "device_map={} names no device; name at least {'': 'cpu'}"
            )
        devices = [_device(device, part=path) for path, device in device_map.items()]
        return devices[0]
    if device_map is None:
        default = torch.get_default_device()
        if default.type == "meta":
            raise UnsupportedBackendError(
                "torch's default device here is meta, which holds no data: load outside of "
                "torch.device('meta'), or build a model without weights by from_config"
            )
        return default
    if device_map in STRATEGIES:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _device(device_map)


def layout(
    model_parts: Sequence[ModelPart], capacity: Mapping[torch.device, int], strategy: str
) -> Mapping[str, torch.device]:
    """Assign parts to devices in order, so that a forward visits each device once.

    "sequential" fills each up; "balanced" gives each the same share of the bytes as far as it has
    room; "auto" does so with as few devices as hold it all, those with most room, the CPU last.

    Raises:
        DoesNotFitError: there is too little room.
    """
    total = sum(part.nbytes for part in model_parts)
    devices = list(capacity)
    counts = range(1, len(devices) + 1) if strategy == "auto" else [len(devices)]
    for count in counts:
        roomy = sorted(devices, key=lambda one: (one.type == "cpu", -capacity[one]))[:count]
        first = {device: size for device, size in capacity.items() if device in roomy}
        placed = None if strategy == "sequential" else _even(model_parts, first)
        placed = placed or _filled_up(model_parts, first)
        if placed is not None:
            return MappingProxyType(placed)
    rooms = ", ".join(f"{device}: {gigabytes(size)}" for device, size in capacity.items())
    raise DoesNotFitError(
        f"the model needs {gigabytes(total)} for its weights, its largest part "
        f"{gigabytes(max(part.nbytes for part in model_parts))}, and there is {rooms}; "
        "quantise it, or give it more or larger devices"
    )


def _even(
    model_parts: Sequence[ModelPart], capacity: Mapping[torch.device, int]
) -> dict[str, torch.device] | None:
    """Cut the parts into shares of similar size, or return None if one does not fit."""
    devices = list(capacity)
    share = sum(part.nbytes for part in model_parts) / len(devices)
    placed, used, before = {}, dict.fromkeys(devices, 0), 0
    for part in model_parts:
        index = int((before + part.nbytes / 2) / share) if share else 0
        device = devices[min(index, len(devices) - 1)]
        placed[part.path] = device
        used[device] += part.nbytes
        before += part.nbytes
    return placed if all(used[device] <= capacity[device] for device in devices) else None


def _filled_up(
    model_parts: Sequence[ModelPart], capacity: Mapping[torch.device, int]
) -> dict[str, torch.device] | None:
    """Fill one device after another, or return None if the last one is too small."""
    devices = iter(capacity.items())
    device, room = next(devices)
    placed = {}
    for part in model_parts:
        while part.nbytes > room:
            following = next(devices, None)
            if following is None:
                return None
            device, room = following
        placed[part.path] = device
        room -= part.nbytes
    return placed


def _mapped(device_map: Mapping[str, Device], model_parts: Sequence[ModelPart]) -> Placement:
    devices = {path: _device(device, part=path) for path, device in device_map.items()}
    placement = Placement(MappingProxyType(devices))
    paths = [part.path for part in model_parts]
    for path in devices:
        inside = any(p == path or p.startswith(f"{path}.") for p in paths)
        if path and not inside:
            known = {
                ".".join(p.split(".")[: i + 1]) for p in paths for i in range(p.count(".") + 1)
            }
            near = difflib.get_close_matches(path, sorted(known), n=1)
            hint = (
                f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(paths[:4])}, …"
            )
            raise InputError(f"device_map names {path!r}, which is no part of the model{hint}")
    if missing := [path for path in paths if not placement.covers(path)]:
        raise InputError(
            f"device_map leaves out {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}; add them, or '' for all the rest"
        )
    return placement


def _paths(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the parts: members of module lists, and everything that contains no list."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and not path.endswith("]"):
            yield from (f"{below}.{i}" for i in range(len(child)))
        elif any(isinstance(inner, nn.ModuleList) for inner in child.children()):
            yield from _paths(child, below)
        else:
            yield below


def _capacity(max_memory: MaxMemory | None) -> dict[torch.device, int]:
    """Return the bytes of weights each device may hold, the CPU last."""
    if max_memory is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.device("cuda", index) for index in range(count)]
        cpu = torch.device("cpu")
        if not devices:
            return {cpu: free_memory(cpu)}
        return {device: int(SHARE * free_memory(device)) for device in (*devices, cpu)}
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise InputError(f"max_memory={shown(max_memory)} has to map devices to bytes or '10GB'")
    given = {_device(device, part="max_memory"): size for device, size in max_memory.items()}
    sizes = {}
    for device, size in given.items():
        try:
            sizes[device] = parse_size(size)
        except InputError:
            raise InputError(
                f"max_memory of {device} is {shown(size)}; it has to be a number of bytes, or text "
                "such as '10GB' or '10GiB'"
            ) from None
    return dict(sorted(sizes.items(), key=lambda item: item[0].type == "cpu"))


def _device(device: Device, part: str = "") -> torch.device:
    named_device = shown(device)
    named = (
        f"device_map={named_device}"
        if not part
        else f"device_map of {shown(part)} is {named_device}, which"
    )
    if device == -1:
        return torch.device("cpu")
    if device == "disk":
        raise UnsupportedBackendError(
            f"{named} is not supported: weights are mapped from their files already, so that the "
            "system holds of them what it has room for; use 'cpu', or quantise the model"
        )
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=found, dtype=torch.float32)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UnsupportedBackendError(
            f"{named} is not a device of this machine ({reason})"
        ) from None
    return found


def gigabytes(size: int) -> str:
    """Format a number of bytes."""
    return f"{size / 1e9:.2f} GB"
