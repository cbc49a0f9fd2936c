"""Triton's interpreter, with bfloat16 as a GPU has it, and in half the time.

NumPy knows no bfloat16. The interpreter keeps its bits as integers, cuts off where a GPU rounds to
the nearest, and multiplies the integers in a product of matrices. Arithmetic on bfloat16 itself
stays wrong there: kernels widen to float32 first, as a GPU does inside.

Half of its time went where nothing is computed: every call of a function by a kernel replaced
Triton's language anew, each sum and product of integers was looked at for an overflow in further
operations of that language, and types of NumPy were looked up in a table made for each look.
"""

import operator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = ["mend"]

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
# Whatever module of Triton's a kernel knows: what it calls may know the other.
EVERYWHERE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def widened(x: Any) -> Any:
    """Return the float32 that bits of bfloat16 stand for."""
    return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)


def rounded(x: Any) -> Any:
    """Return the bits of the nearest bfloat16."""
    there = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    return there.view(torch.int16).numpy().view(np.uint16)


def mend() -> None:
    """Have the interpreter of this process do so, from now on."""
    cast, dot = Builder.cast_impl, Builder.create_dot
    if cast.__module__ == __name__:
        return

    def cast_impl(self: Any, src: Any, to: Any) -> Any:
        pair = (src.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return Handle(rounded(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return Handle(widened(src.data), tl.float32)
        return cast(self, src, to)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        a, b = (
            Handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *how)

    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
    # They were bound to what was there.
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(Builder, name, lambda self, src, to: self.cast_impl(src, to))
    _quicken()


def _quicken() -> None:
    looked_up = interpreter._get_np_dtype
    kept = cache(looked_up)
    interpreter._get_np_dtype = lambda kind: (kept if type(kind) is tl.dtype else looked_up)(kind)
    replace = interpreter._patch_lang
    interpreter._patch_lang = lambda kernel: replace(EVERYWHERE)
    interpreter.InterpretedFunction.__call__ = _called
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def _called(self: Any, *given: Any, **named: Any) -> Any:
    """Run what a kernel calls: the language was replaced where the kernel was launched."""
    return self.rewrite()(*given, **named)


def _refuse_overflow(self: Any, one: Any, other: Any, operation: Any) -> None:
    kind, name = one.type.scalar, operation.__name__
    if kind.int_bitwidth < 64:
        made = ARITHMETIC[name](*(x.handle.data.astype(np.int64) for x in (one, other)))
        inside = (made >= kind.get_int_min_value()) & (made <= kind.get_int_max_value())
        assert inside.all(), f"int{kind.int_bitwidth} overflow detected for operation {name}"
