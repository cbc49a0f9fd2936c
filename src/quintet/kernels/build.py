"""From the C++ sources beside this file to a shared library in the user's cache. No torch."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["LEVELS", "BuildError", "best_level", "build", "cache_folder", "find_compiler"]

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp")
# A compiler that hangs must not hang the program that only wanted to be faster.
TIMEOUT = 1800.0


class BuildError(Exception):
    """Why there is no library; its text is what `report()` shows."""


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
            raise BuildError(f"QUINTET_KERNELS={wanted!r} is none of 0, {', '.join(LEVELS)}")
        if wanted not in have:
            raise BuildError(f"QUINTET_KERNELS={wanted!r}, and this CPU does not have it")
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
        raise BuildError(f"CXX={named!r} is not a program that can be run")
    raise BuildError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, CXX not set")


def build(level: str, openmp: Path | None = None) -> Path:
    """Return the library for a level, compiled now unless the cache has it.

    Args:
        level: a name of `LEVELS`.
        openmp: the OpenMP runtime to link, by default the compiler's own.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    options = [*FLAGS, *LEVELS[level].options]
    folder = cache_folder()
    target = folder / f"kernels-{level}-{_key(compiler, options, openmp)}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / "build.lock"):
            if not target.exists():
                _compile(compiler, options, sources, target, openmp)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be written: {error.strerror}") from error
    return target


def _compile(
    compiler: str, options: list[str], sources: list[Path], target: Path, openmp: Path | None
) -> None:
    # Beside the target, so that the rename is one step: a library is there whole or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        # The threads wait for compilers, of which there are as many as there are cores.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            commands = [
                [compiler, *options, "-c", str(source), "-o", str(made)]
                for source, made in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        made = Path(scratch) / target.name
        command = [compiler, *options, "-shared", *map(str, objects), "-o", str(made)]
        # Named after the sources, this very file is what the loader finds already loaded.
        command += [str(openmp)] if openmp else []
        _run(command)
        os.replace(made, target)


def _run(command: list[str]) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took longer than {TIMEOUT:.0f} s") from None
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if "error" in line]
        raise BuildError(f"{command[0]} failed: {(said or [run.stderr.strip()])[0][:300]}")


def _key(compiler: str, options: list[str], openmp: Path | None) -> str:
    found = hashlib.sha256()
    for source in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        found.update(source.read_bytes())
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run: {error}") from error
    found.update(version)
    found.update("\0".join([*options, str(openmp)]).encode())
    return found.hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of this user where what is compiled is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "quintet"


def _cpu_features() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    raise BuildError("the kernels are for x86-64 on Linux")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # there is none outside of POSIX, where there is no /proc/cpuinfo either

    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
