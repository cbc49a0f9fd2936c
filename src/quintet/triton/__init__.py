"""Triton kernels for GPUs, as a backend: each beside its definition in `quintet.ops`.

A file is one idea: its kernels, and the functions that launch them, which return None if they do
not apply. Nothing here is imported where there is no GPU, but this file.
"""

from importlib.util import find_spec

import torch

from quintet.backends import Backend

__all__ = ["backends"]


def backends() -> tuple[Backend, ...]:
    """Return the backend of this folder if there is a CUDA device and Triton, else nothing."""
    # Counting does not start CUDA, which processes that fork could not use then.
    if not torch.cuda.device_count() or find_spec("triton") is None:
        return ()
    from quintet.triton.backend import BACKEND

    return (BACKEND,)
