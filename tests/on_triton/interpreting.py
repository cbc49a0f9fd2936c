"""bfloat16 in Triton's interpreter as a GPU has it.

NumPy knows no bfloat16. The interpreter keeps its bits as integers, cuts off where a GPU rounds to
the nearest, and multiplies the integers in a product of matrices. Arithmetic on bfloat16 itself
stays wrong there: kernels widen to float32 first, as a GPU does inside.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend"]

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


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
