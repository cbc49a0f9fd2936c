"""Loads the compiled library once per process, building it if needed."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # noqa: F401 - the OpenMP runtime that it brings is asked for below

from quintet.backends import OFF, REGISTRY
from quintet.kernels.allocator import keep_freed_memory
from quintet.kernels.build import Recipe, best_level, recipe
from quintet.kernels.patience import log
from quintet.kernels.store import BuildError


@dataclass(frozen=True, slots=True)
class Native:
    """The library, or the reason why there is none.

    Attributes:
        library: what ctypes loaded; None where the kernels cannot be had.
        level: the instruction set it was compiled for.
        reason: why there is no library.
    """

    library: ctypes.CDLL | None
    level: str | None
    reason: str | None


@cache
def native() -> Native:
    """Return this machine's library, compiling it on first use.

    Why there is none is logged where something can be done about it.
    """
    try:
        found = find_recipe()
        path = found.make()
    except BuildError as error:
        if error.remedy is not None:
            log.warning(
                "models run on PyTorch, several times slower than on kernels for this CPU: %s; %s",
                error,
                error.remedy,
            )
        return Native(None, None, str(error))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("models run on PyTorch, as %s cannot be loaded: %s", path, error)
        return Native(None, None, f"{path} cannot be loaded: {error}")
    keep_freed_memory()
    return Native(library, found.level, None)


def find_recipe() -> Recipe:
    """Return the recipe of this process's library.

    Raises:
        BuildError: it cannot be, on this machine or with these environment variables.
    """
    asked = os.environ.get("QUINTET_KERNELS")
    if asked == "0":
        raise BuildError("turned off by QUINTET_KERNELS=0")
    if "kernels" in REGISTRY.off:
        raise BuildError(f"turned off by {OFF}")
    return recipe(best_level(None if asked in (None, "", "1") else asked), _openmp())


@cache
def entry(name: str) -> "ctypes._NamedFuncPointer":
    """Return a function of the library, which must exist.

    It takes the address of a call's fields and how many bytes they are (`quintet.kernels.calls`),
    and returns 0 if it ran.
    """
    library = native().library
    if library is None:
        raise RuntimeError(f"there is no library, and so no kernel {name}")
    function = library[f"quintet_{name}"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_int64
    return function


def available() -> bool:
    """Return whether the library is available."""
    return native().library is not None


def _openmp() -> Path | None:
    """Return torch's OpenMP runtime; a second one would compete with it.

    Other packages bring their own into the process, so it is asked which one torch's call finds.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            mapped = [line.split(maxsplit=5) for line in file if ".so" in line]
    except OSError:
        return None
    spans = [(fields[0].split("-"), fields[5].strip()) for fields in mapped if len(fields) == 6]
    torchs = next((path for _, path in spans if Path(path).name == "libtorch_cpu.so"), None)
    # As the loader looks: what is global first, then what torch's library depends on.
    for name in (None, torchs):
        try:
            function = ctypes.CDLL(name)["omp_get_max_threads"]
        except (AttributeError, OSError):
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        for (start, end), path in spans:
            if int(start, 16) <= address < int(end, 16):
                return Path(path)
    return None
