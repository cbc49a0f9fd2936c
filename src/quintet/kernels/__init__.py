"""Our own C++ kernels for CPUs, beside the PyTorch they are tested against.

The sources in `csrc/` have a plain C interface and are compiled once, by the system's compiler,
into the user's cache: by `python -m quintet.kernels`, or at first use. Where that cannot be, every
function here returns None, its caller computes in PyTorch, and `report()` says why.
`QUINTET_KERNELS=0` turns them off; the name of a level (`avx2`, …) chooses that one.
"""

from quintet.kernels.report import Kernel, Report, report

__all__ = ["Kernel", "Report", "report"]
