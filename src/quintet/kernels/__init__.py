"""C++ kernels for CPUs, tested against the PyTorch definitions.

The sources in `csrc/` have a plain C interface and are compiled once, by the system's compiler,
into the user's cache: by `python -m quintet.kernels`, or at first use, which is told. Where that
cannot be, every function here returns None, its caller computes in PyTorch, and a warning of the
logger `quintet.kernels` and `report()` say why.
`QUINTET_KERNELS=0` turns them off; the name of a level (`avx2`, …) chooses that one.
"""

from quintet.kernels.report import Kernel, Report, outlook, report

__all__ = ["Kernel", "Report", "outlook", "report"]
