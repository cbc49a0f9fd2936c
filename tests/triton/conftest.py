"""Kernels run in Triton's interpreter here, with bfloat16 as a GPU has it."""

from importlib.util import find_spec

import torch

if find_spec("triton") and not torch.cuda.device_count():
    from on_triton.interpreting import mend

    mend()
