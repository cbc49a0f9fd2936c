"""Compiles the C++ sources to a shared library in the user's cache, without torch."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quintet.kernels import store
from quintet.kernels.patience import SILENT, log, told
from quintet.kernels.store import BuildError

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden")
# A compiler that hangs must not hang the program that only wanted to be faster.
TIMEOUT = 600.0
UNSET = "unset it to take the best this CPU has"
OTHER_COMPILER = "set CXX to a compiler that works"


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set the sources can be compiled for.

    Attributes:
        features: what the CPU must have, by its names in /proc/cpuinfo.
        options: what the compiler is told.
    """

    features: frozenset[str]
    options: tuple[str, ...]


def _level(names: str) -> Level:
    options = tuple(f"-m{name.replace('_', '')}" for name in names.split())
    return Level(frozenset(names.split()), options)


AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"
# From the best down.
LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "avx512_bf16": _level(f"{AVX512} avx512_vnni avx512_bf16"),
        "avx512_vnni": _level(f"{AVX512} avx512_vnni"),
        "avx512": _level(AVX512),
        "avx2": _level(AVX2),
    }
)


def best_level(wanted: str | None = None) -> str:
    """Return the best level this CPU has, or the `wanted` one if it has that.

    Raises:
        BuildError: it has none, or not the one wanted.
    """
    features = _cpu_features()
    have = [name for name, level in LEVELS.items() if level.features <= features]
    if wanted is not None:
        if wanted not in LEVELS:
            raise BuildError(f"QUINTET_KERNELS={wanted!r} is none of 0, {', '.join(LEVELS)}", UNSET)
        if wanted not in have:
            raise BuildError(f"QUINTET_KERNELS={wanted!r}, and this CPU does not have it", UNSET)
        return wanted
    if not have:
        raise BuildError("this CPU has no AVX2, the least the kernels are written for")
    return have[0]


def find_compiler() -> str:
    """Return the path of a C++ compiler: $CXX, or the first of g++, clang++ and c++.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if path := shutil.which(name):
            return path
    if named:
        raise BuildError(f"CXX={named!r} is not a program that can be run", OTHER_COMPILER)
    raise BuildError(
        f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, CXX not set",
        "install one, such as by `apt install g++` or `dnf install gcc-c++`",
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build the library for a level, and where it goes.

    Attributes:
        level: a name of `LEVELS`.
        compiler: the path of a C++ compiler.
        options: what it is told for every source.
        openmp: the OpenMP runtime to link; None for the compiler's own.
        target: the library.
    """

    level: str
    compiler: str
    options: tuple[str, ...]
    openmp: Path | None
    target: Path

    def made(self) -> bool:
        """Return whether the library exists."""
        return store.is_whole(self.target)

    def make(self) -> Path:
        """Return the library, compiling it if needed.

        Raises:
            BuildError: the compiler fails, or the cache cannot be used.
        """
        folder = store.open_folder()
        try:
            if not self.made():
                with store.held(folder):
                    # Another process may have made it meanwhile.
                    if not self.made():
                        self._compile(folder)
        except OSError as error:
            raise BuildError(
                f"the cache {folder} cannot be written: {error.strerror}", store.REMEDY
            ) from error
        with contextlib.suppress(OSError):
            # The least lately used ones are removed one day.
            os.utime(self.target)
        return self.target

    def _compile(self, folder: Path) -> None:
        started = time.monotonic()
        saying = f"compiling kernels for this CPU ({self.level}), once; usually half a minute"
        # Beside the target, so that the move is one step.
        with told(saying), store.scratch(folder) as scratch:
            # Backwards: whole stacks take longest, and no compiler is to begin with one last.
            sources = sorted(SOURCES.glob("*.cpp"), reverse=True)
            objects = [scratch / f"{source.stem}.o" for source in sources]
            # The threads wait for compilers, of which there are as many as there are cores.
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                commands = [
                    [self.compiler, *self.options, "-c", str(source), "-o", str(made)]
                    for source, made in zip(sources, objects, strict=True)
                ]
                list(pool.map(_run, commands))
            made = scratch / self.target.name
            command = [self.compiler, *self.options, "-shared", *map(str, objects), "-o", str(made)]
            # Named after the sources, this very file is what the loader finds already loaded.
            command += [str(self.openmp)] if self.openmp else []
            _run(command)
            store.publish(made, self.target)
        seconds = time.monotonic() - started
        if seconds > SILENT:
            log.warning("kernels compiled in %.0f s", seconds)


def recipe(level: str, openmp: Path | None = None) -> Recipe:
    """Return the recipe for a level on this machine.

    Args:
        level: a name of `LEVELS`.
        openmp: the OpenMP runtime to link, by default the compiler's own.

    Raises:
        BuildError: there is no compiler, or it does not run.
    """
    compiler = find_compiler()
    # What looks for faults is compiled in by further options, as `make sanitize` does.
    further = os.environ.get("QUINTET_KERNELS_FLAGS", "").split()
    options = (*FLAGS, *LEVELS[level].options, *further)
    name = f"kernels-{level}-{_key(compiler, options, openmp)}.so"
    return Recipe(level, compiler, options, openmp, store.cache_folder() / name)


def _run(command: list[str]) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT:.0f} s", OTHER_COMPILER) from None
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if "error" in line]
        raise BuildError(
            f"{command[0]} failed: {(said or [run.stderr.strip()])[0][:300]}", OTHER_COMPILER
        )


def _key(compiler: str, options: tuple[str, ...], openmp: Path | None) -> str:
    found = hashlib.sha256()
    for source in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        found.update(source.read_bytes())
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run: {error}", OTHER_COMPILER) from error
    found.update(version)
    found.update("\0".join([*options, str(openmp)]).encode())
    return found.hexdigest()[:16]


def _cpu_features() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    # No remedy: nobody on another machine needs to hear of it.
    raise BuildError("the kernels are for x86-64 on Linux")
