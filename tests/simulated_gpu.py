"""A device that is not there: numbers on the CPU behind tensors that say they are elsewhere.

What a program asks of it is what it would ask of a GPU. Whatever would make the host wait for a
real one is counted, with the line that asked for it; and what is done inside of `recording` can be
done again without the program, as a CUDA graph is replayed.
"""

import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "NAME",
    "Again",
    "Recording",
    "Replayed",
    "Simulated",
    "SimulatedGPU",
    "cuda_memory",
    "moved",
]

# To torch it is the device that has no numbers, the only other one that every build knows.
NAME = "meta"
ROOT = str(Path(__file__).parents[1])
aten = torch.ops.aten

# What has to know numbers before it knows a shape, or a number itself.
DATA_DEPENDENT = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Simulated(Tensor):
    """A tensor that says it is on the device."""

    inner: Tensor
    is_meta = False

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Simulated":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NAME,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a SimulatedGPU")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        SimulatedGPU.running().waited("tolist")
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Simulated({self.inner!r})"


class SimulatedGPU(TorchDispatchMode):
    """The device, while inside.

    Attributes:
        waits: what made the host wait, and where it was asked for.
        launches: how many operations there were.
        fetched: how many copies to the host that it went on meanwhile.
    """

    _running: ClassVar["list[SimulatedGPU]"] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches = self.fetched = 0
        self.recording: Recording | None = None

    @classmethod
    def running(cls) -> "SimulatedGPU":
        return cls._running[-1]

    def __enter__(self) -> Any:
        self._running.append(self)
        self._making = _Making()
        self._making.__enter__()
        self._event, torch.Event = torch.Event, _Event  # type: ignore[misc]
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        self._running.pop()
        self._making.__exit__(None, None, None)
        torch.Event = self._event  # type: ignore[misc]
        return super().__exit__(*args)

    def waited(self, what: str) -> None:
        assert self.recording is None, f"{what} inside of what is recorded"
        lines = [
            f"{Path(one.filename).name}:{one.lineno} {one.name}"
            for one in traceback.extract_stack()
            if one.filename.startswith(ROOT) and one.filename != __file__
        ]
        self.waits.append(f"{what} at {' < '.join(reversed(lines))}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        asked = device is not None and torch.device(device).type == NAME
        there: list[Simulated] = []
        here: list[Tensor] = []
        own = [_inner(x, there, here) for x in args]
        options = {name: _inner(x, there, here) for name, x in kwargs.items()}
        if not there and not asked:
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0
        self.launches += 1
        goes = func is aten.copy_.default and not isinstance(args[0], Simulated)
        goes |= device is not None and not asked
        self._count(func, args, kwargs, here, goes=goes)
        if asked:
            options["device"] = "cpu"
        options.pop("pin_memory", None)
        made = func(*own, **options)
        if goes:
            return args[0] if func is aten.copy_.default else made
        if self.recording is not None:
            self.recording.take(func, own, options, made)
        if type(made) is Tensor:
            return _outer(made, there)
        return pytree.tree_map_only(Tensor, lambda x: _outer(x, there), made)

    def _count(self, func: Any, args: Any, kwargs: Any, here: list[Tensor], *, goes: bool) -> None:
        if func in DATA_DEPENDENT:
            self.waited(str(func))
        elif func in COPIES and (goes or here):
            late = kwargs.get("non_blocking") or args[2:3] == (True,)
            self.fetched += bool(goes and late)
            if not late:
                self.waited("a copy to the host" if goes else "a copy from the host")
            assert self.recording is None, "a copy to or from the host inside of what is recorded"
        elif func in INDEXED:
            places = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool for x in places):
                self.waited("an index by truths")
            if not all(isinstance(x, Simulated) for x in places):
                self.waited("an index from the host")
        elif any(x.ndim for x in here):
            raise AssertionError(f"{func} of tensors on two devices")


def _inner(x: Any, there: list[Simulated], here: list[Tensor]) -> Any:
    """Return an argument as it is on the CPU, and add it to those of a kind."""
    if isinstance(x, Simulated):
        there.append(x)
        return x.inner
    if isinstance(x, Tensor):
        here.append(x)
    elif isinstance(x, list | tuple):
        return [_inner(one, there, here) for one in x]
    return x


def _outer(x: Tensor, there: list[Simulated]) -> Simulated:
    """Return what was made as a tensor of the device: one that was given, where it is that."""
    known = [one for one in there if one.inner is x]
    return known[0] if known else Simulated(x)


class Recording:
    """What was done, to be done again with what is in the same memory by then."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def take(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        outputs = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
        self.steps.append((func, args, kwargs, outputs))

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.steps:
            with torch.no_grad():
                made = func(*args, **kwargs)
            for old, new in zip(
                outputs, (x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)), strict=True
            ):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record what is done inside."""
    device = SimulatedGPU.running()
    device.recording = made = Recording()
    try:
        yield made
    finally:
        device.recording = None


class Replayed:
    """What records steps of the device, and counts how often they were done again."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        function()
        with recorded() as steps:
            made = function()

        def replay() -> Tensor:
            self.replays += 1
            steps.replay()
            return made

        return replay


class Again:
    """Recordings that do again what they are of, and count how often."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        function()

        def replay() -> Tensor:
            self.replayed += 1
            return function()

        return replay


def moved(model: nn.Module) -> Any:
    """Put a model on the device, for good."""
    held: dict[int, Any] = {}

    def there(x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        if id(x) not in held:
            held[id(x)] = make(Simulated(x.detach()))
        return held[id(x)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = there(
                    parameter, lambda x: nn.Parameter(x, requires_grad=False)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer, lambda x: x)
    return model


class _Making(TorchFunctionMode):
    """Makes tensors of the host's numbers as a device gets them: on the host first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, device="cpu", **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], Simulated):
            return torch.tensor(args[1], dtype=args[0].dtype, device="cpu").to(NAME)
        return func(*args, **kwargs)


class _Event:
    """What is waited for where only copies under way are: they are here at once."""

    def __init__(self, device: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def cuda_memory(*free: int, kept: int = 0) -> Iterator[None]:
    """Have torch tell of CUDA devices with so much free memory each, and what torch keeps of it."""
    told: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: len(free),
        "mem_get_info": lambda device: (free[torch.device(device).index or 0], 1 << 40),
        "memory_reserved": lambda device: 5 * kept,
        "memory_allocated": lambda device: 4 * kept,
    }
    with unittest.mock.patch.multiple(torch.cuda, **told):
        yield
