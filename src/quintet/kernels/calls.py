"""Calls of kernels: arguments are checked and written into fixed fields.

A tensor is written with the dtype and the shape it has to have. What crosses is its address, how
many bytes from there on are its own, and the steps between its axes where there may be gaps. The
other side compares that with what it is going to touch before it touches it (csrc/span.h). Where
either finds that something does not fit, no kernel runs, and PyTorch says what is wrong.
"""

import struct
from array import array

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quintet.kernels.native import available, entry

PLAIN = (Tensor, torch.nn.Parameter)
STRIDED = torch.strided
NOTHING = (0, 0)
AS_REAL, AS_INTEGER = struct.Struct("d"), struct.Struct("q")


def watched() -> bool:
    """Return whether torch modes, tracers or transforms must see every operation.

    That is a compiler or tracer, autocast, a transform of functions, forward-mode derivatives, and
    every mode of torch, `torch.device(...)` among them.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def applies(*tensors: Tensor) -> bool:
    """Return whether kernels may read these tensors: plain, on the CPU, unobserved."""
    if watched():
        return False
    learns = torch.is_grad_enabled()
    return all(_plain(tensor, learns) for tensor in tensors)


def _plain(x: Tensor, learns: bool) -> bool:
    """Return whether a tensor is dense numbers that require no gradient."""
    return (
        type(x) in PLAIN
        and x.is_cpu
        and x.layout is STRIDED
        and not x.is_neg()
        and not (learns and x.requires_grad)
    )


def begin() -> "Call | None":
    """Return an empty call, or None without a library or under observation."""
    # Asked first: what traces this must not look into the rest.
    return None if watched() or not available() else Call()


def firsts(start: int | Tensor, B: int) -> list[int] | None:
    """Return the first slot of each of B rows, or None if `start` is no such thing."""
    if isinstance(start, int):
        return [start] * B
    whole = start.dtype in (torch.int64, torch.int32) and start.shape == (B,)
    return start.tolist() if whole and applies(start) else None


class Call:
    """The eight-byte fields of a call, in the order that C++ declares.

    Attributes:
        fit: whether all tensors so far are as they have to be; nothing is written behind one that
            is not.
        fields: what was written.
        tensors: those whose addresses are among it, kept alive.
    """

    __slots__ = ("_learns", "fields", "fit", "tensors")

    def __init__(self) -> None:
        # OpenMP counts threads for each thread by itself, and torch tells it when first asked here.
        torch.get_num_threads()
        self._learns = torch.is_grad_enabled()
        self.fit = True
        self.fields: list[int] = []
        self.tensors: list[Tensor] = []

    def integers(self, *values: int) -> None:
        """Write integers."""
        self.fields += values

    def real(self, value: float) -> None:
        """Write a float64."""
        self.fields += AS_INTEGER.unpack(AS_REAL.pack(value))

    def packed(self, x: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
        """Write a contiguous tensor of a dtype and shape; zeros for None."""
        if x is None:
            self.fields += NOTHING
        elif self._takes(x, dtype, shape) and x.is_contiguous():
            self._write(x)
        else:
            self.fit = False

    def copied(self, x: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
        """Write a strided tensor, copied if needed; zeros for None."""
        if x is None:
            self.fields += NOTHING
        elif self._takes(x, dtype, shape):
            self._write(x if x.is_contiguous() else x.contiguous())
        else:
            self.fit = False

    def rows(self, x: Tensor, dtype: torch.dtype, *shape: int, axes: int = 0) -> None:
        """Write a tensor whose last axis is contiguous, with the other strides.

        Args:
            axes: how many steps are written; zeros stand for those of axes it does not have.
        """
        if not self._takes(x, dtype, shape):
            self.fit = False
            return
        *steps, last = x.stride()
        if last != 1 and shape[-1] > 1:
            self.fit = False
            return
        reach = shape[-1]
        for n, step in zip(shape, steps, strict=False):
            reach += (n - 1) * step
        self.fields += (x.data_ptr(), reach * x.itemsize if x.numel() else 0)
        self.fields += (0,) * (axes - len(steps))
        self.fields += steps
        self.tensors.append(x)

    def stack(self, x: Tensor, dtype: torch.dtype, *shape: int, unit: int = 1) -> None:
        """Write a tensor that is contiguous but for its first axis, with that stride.

        Args:
            unit: by what the step is multiplied.
        """
        if not self._takes(x, dtype, shape) or not x.numel() or not x[:1].is_contiguous():
            self.fit = False
            return
        step = x.stride(0)
        reach = (shape[0] - 1) * step + x.numel() // shape[0]
        self.fields += (x.data_ptr(), reach * x.itemsize, step * unit)
        self.tensors.append(x)

    def chosen(self, indices: Tensor, shares: Tensor, N: int, A: int) -> None:
        """Write the experts (N, A) of tokens and their weights."""
        self.copied(indices, torch.int64, N, A)
        # Asked before they are converted, as what is made is always plain.
        if shares.is_floating_point() and self._takes(shares, shares.dtype, (N, A)):
            self._write(shares.to(torch.float32).contiguous())
        else:
            self.fit = False

    def output(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Write where the output goes, and return it.

        Args:
            like: one of what was written, whose dtype it has by default.
        """
        if not self.fit:
            return like
        # Asking for the dtype it has takes longer than the rest.
        made = like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
        self._write(made)
        return made

    def _write(self, x: Tensor) -> None:
        self.fields += (x.data_ptr(), x.nbytes)
        self.tensors.append(x)

    def run(self, name: str) -> bool:
        """Run a kernel; return False if an argument does not fit."""
        if not self.fit:
            return False
        given = array("q", self.fields)
        address, count = given.buffer_info()
        refused: int = entry(name)(address, 8 * count)
        return not refused

    def _takes(self, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return self.fit and x.dtype == dtype and x.shape == shape and _plain(x, self._learns)
