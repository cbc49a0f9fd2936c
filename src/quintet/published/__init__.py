"""Kernels that others publish as packages, each a backend that is switched on by request.

`QUINTET_BACKENDS_ON=flash-attn,deep-gemm` asks for those of these names. A file is one package: the
part of its interface that is called, as a Protocol with the published names, and functions that
translate an operation into it. No package is imported before it is called.
"""

from quintet.published import deep_gemm, flash_attention, flash_mla, mamba_ssm

__all__ = ["BACKENDS"]

BACKENDS = (flash_attention.BACKEND, flash_mla.BACKEND, deep_gemm.BACKEND, mamba_ssm.BACKEND)
