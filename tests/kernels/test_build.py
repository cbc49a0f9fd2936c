import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from forking import Forks
from quintet.kernels import outlook, report
from quintet.kernels.build import SOURCES, best_level, find_compiler, recipe
from quintet.kernels.store import BuildError
from waiting import PATIENCE

# A package brings an OpenMP runtime of its own, under another name, before torch does.
FOREIGN_OPENMP = """
import ctypes, importlib.util, pathlib
torchs = pathlib.Path(importlib.util.find_spec("torch").origin).parent
(gomp,) = torchs.glob("lib/libgomp.so.1")
foreign = pathlib.Path(r"{folder}") / "libgomp-abc.so.1"
foreign.write_bytes(gomp.read_bytes().replace(b"libgomp.so.1\\0", b"libgomp.so.9\\0"))
ctypes.CDLL(str(foreign))
"""

try:
    LEVEL = best_level()
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_every_kernel_says_what_it_runs_on(level: str) -> None:
    found = report()
    assert found.kernels
    assert {kernel.level for kernel in found.kernels} == {level}
    assert {kernel.reason for kernel in found.kernels} == {None}
    assert found.library is not None
    assert level in str(found)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"QUINTET_KERNELS": "0"}, "turned off by QUINTET_KERNELS=0"),
        ({"QUINTET_KERNELS": "neon"}, "QUINTET_KERNELS='neon' is none of"),
        ({"CXX": "/nowhere/g++"}, "CXX='/nowhere/g++' is not a program"),
        ({"PATH": ""}, "no C++ compiler"),
        ({"CXX": "false"}, "false"),
    ],
    ids=str,
)
def test_without_a_library_it_says_why(
    fresh: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    variables: dict[str, str],
    reason: str,
) -> None:
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.delenv("CXX", raising=False)
    for name, value in variables.items():
        fresh.setenv(name, value)
    found = report()
    assert found.library is None
    assert all(kernel.level is None and reason in str(kernel.reason) for kernel in found.kernels)
    assert reason in str(found)
    assert reason in outlook()
    # Told once, with what to do about it; not where it was asked for.
    told = 0 if variables.get("QUINTET_KERNELS") == "0" else 1
    assert ["several times slower" in r.getMessage() for r in caplog.records] == [True] * told


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "broken"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho "error: no bits" >&2\nexit 1'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="error: no bits"):
        recipe(LEVEL).make()
    assert not list(tmp_path.glob("quintet/*.so"))


def test_a_cache_that_cannot_be_written_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of the folder: permissions do not stop the superuser.
    (tmp_path / "quintet").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="cannot be used"):
        recipe(LEVEL).make()


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes an empty file in the place of every source, and the log of its runs."""
    compiler, log = tmp_path / "quick", tmp_path / "log"
    (tmp_path / "empty.cpp").touch()
    compiler.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] || echo ran >> {log}
for given; do
    shift
    case "$given" in *.cpp) given={tmp_path}/empty.cpp ;; esac
    set -- "$@" "$given"
done
exec {find_compiler()} "$@"
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUINTET_KERNELS", raising=False)
    return log


def test_it_is_compiled_once_whoever_asks(tmp_path: Path, quick: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: recipe(LEVEL).make(), range(4)))
    assert len(paths) == 1
    # Every source, and the library that is made of them.
    assert len(quick.read_text().split()) == len(list(SOURCES.glob("*.cpp"))) + 1
    folder = tmp_path / "quintet"
    assert {path.name for path in folder.iterdir()} == {"build.lock", paths.pop().name}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_module_builds_and_reports(tmp_path: Path, quick: Path, forks: Forks) -> None:
    code = "import runpy; runpy.run_module('quintet.kernels', run_name='__main__')"
    run = forks.run(code, environment=os.environ)
    assert run.returncode == 0, run.stderr
    assert LEVEL in run.stdout
    assert list((tmp_path / "quintet").glob(f"kernels-{LEVEL}-*.so"))


USED = """
import torch
from quintet.kernels.native import find_recipe
before = {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.rsplit("/")[-1]}
print(find_recipe().openmp)
from quintet.kernels import report
assert report().library
after = {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.rsplit("/")[-1]}
assert before == after, after - before
"""


@pytest.mark.parametrize("foreign", [False, True])
def test_it_shares_the_runtime_of_torch(tmp_path: Path, foreign: bool) -> None:
    lib = Path(torch.__file__).parent / "lib"
    if not list(lib.glob("libgomp.so.1")):
        pytest.skip("this torch brings no libgomp.so.1 to make another of")
    code = FOREIGN_OPENMP.format(folder=tmp_path) * foreign + USED
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert run.stdout.split() == [str(lib / "libgomp.so.1")]


def test_the_runtime_is_found_whatever_was_imported_before() -> None:
    code = "from quintet.kernels.native import find_recipe as f; print(f().target); import torch; "
    run = subprocess.run(
        [sys.executable, "-c", code + "print(f().target)"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert len(set(run.stdout.split())) == 1
