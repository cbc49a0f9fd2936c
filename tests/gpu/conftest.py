"""The device that is compared with the CPU."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """A CUDA device; another that QUINTET_GPU_CHECK names, to try the checks without one."""
    name = os.environ.get("QUINTET_GPU_CHECK", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; QUINTET_GPU_CHECK=cpu tries the checks without")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device(name)
    torch.backends.cuda.matmul.allow_tf32 = before
