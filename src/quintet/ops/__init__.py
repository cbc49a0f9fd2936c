"""Pure functions of tensors, one idea a file; axis letters are those of docs/notation.md."""

from quintet.backends import REGISTRY
from quintet.kernels.backend import BACKEND as KERNELS
from quintet.published import BACKENDS as PUBLISHED
from quintet.triton import backends as of_gpus

# Another backend is another name here.
for backend in (KERNELS, *of_gpus(), *PUBLISHED):
    REGISTRY.register(backend)
