"""Pure functions of tensors, one idea a file; axis letters are those of docs/notation.md."""

from quintet.backends import REGISTRY
from quintet.kernels.backend import BACKEND as KERNELS

# Another backend is another name here.
for backend in (KERNELS,):
    REGISTRY.register(backend)
