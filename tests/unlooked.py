"""A process in which no library of kernels was looked for yet."""

from quintet.kernels import native

__all__ = ["forget_kernels"]


def forget_kernels() -> None:
    """Have the library looked for again, as the environment says by now."""
    native.native.cache_clear()
    native.entry.cache_clear()
