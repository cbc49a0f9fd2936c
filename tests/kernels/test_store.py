"""Libraries in the cache are whole and the user's own, and nobody waits for them without a word."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quintet.kernels import patience, store
from quintet.kernels.build import Recipe, best_level, recipe
from quintet.kernels.store import BuildError

try:
    LEVEL = best_level()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

# Writes something in the place of what it is asked for.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that is empty, for a compiler that takes no time."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quintet"


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """A process that holds the folder, stopped as by Ctrl-Z."""
    code = (
        "import os, time; from pathlib import Path; from quintet.kernels import store\n"
        f"with store.held(Path({str(folder)!r})): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGSTOP)
        try:
            yield process.pid
        finally:
            process.kill()


def changed(path: Path) -> Iterator[bytes]:
    """What may be found in the place of a library."""
    data = path.read_bytes()
    yield data[:-1]
    yield data[: len(data) // 2]
    yield b""
    yield data + b"\0"
    yield bytes([data[0] ^ 1]) + data[1:]


def test_a_library_that_was_cut_or_changed_is_made_anew(folder: Path) -> None:
    made = recipe(LEVEL).make()
    whole = made.read_bytes()
    for data in changed(made):
        made.write_bytes(data)
        assert not recipe(LEVEL).made()
        assert recipe(LEVEL).make() == made
        assert made.read_bytes() == whole


def test_a_library_that_others_may_write_is_made_anew(folder: Path) -> None:
    made = recipe(LEVEL).make()
    made.chmod(0o777)
    assert not recipe(LEVEL).made()
    recipe(LEVEL).make()
    assert made.stat().st_mode & 0o022 == 0


def test_what_another_user_put_there_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(LEVEL).make()
    # Another user's eyes: only the superuser could give a file away.
    monkeypatch.setattr(os, "geteuid", lambda: made.stat().st_uid + 1)
    monkeypatch.setattr(store, "SUPERUSER", -1)
    with pytest.raises(BuildError, match="belongs to another user") as raised:
        store.is_whole(made)
    assert "XDG_CACHE_HOME" in str(raised.value.remedy)
    with pytest.raises(BuildError, match=f"{folder} belongs to another user"):
        recipe(LEVEL).make()


def test_a_folder_that_others_may_write_is_closed_to_them(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    recipe(LEVEL).make()
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_killed_compilations_left_behind_is_swept(folder: Path) -> None:
    folder.mkdir()
    for name in ("tmpabc", "build-xyz", "inductor"):
        (folder / name).mkdir()
        (folder / name / "half.o").write_text("half")
    made = recipe(LEVEL).make()
    assert {path.name for path in folder.iterdir()} == {made.name, "build.lock", "inductor"}


def test_the_libraries_used_least_lately_are_removed(folder: Path) -> None:
    folder.mkdir()
    old = [folder / f"kernels-{LEVEL}-{i}.so" for i in range(store.KEPT + 2)]
    for age, path in enumerate(reversed(old)):
        path.write_text("old")
        os.utime(path, (1000 - age, 1000 - age))
    made = recipe(LEVEL).make()
    assert set(folder.glob("*.so")) == {made, *old[2:]}


def test_waiting_for_a_process_that_is_stopped_is_told_and_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 2.0)
    monkeypatch.setattr(patience, "SILENT", 0.1)
    folder.mkdir()
    with (
        another_process(folder) as process,
        pytest.raises(BuildError, match=f"process {process} has been compiling"),
    ):
        recipe(LEVEL).make()
    assert f"waiting for process {process}" in caplog.text
    # Once it is gone, so is what it held.
    assert recipe(LEVEL).make().exists()


def test_compiling_that_takes_long_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe(LEVEL).make()
    assert not caplog.records
    compiler = Path(os.environ["CXX"])
    compiler.write_text(COMPILER.replace("exit\n", "exit\nsleep 0.2\n"))
    monkeypatch.setattr(patience, "SILENT", 0.1)
    found = recipe(LEVEL)
    Recipe(found.level, found.compiler, found.options, None, folder / "another.so").make()
    assert f"compiling kernels for this CPU ({LEVEL})" in caplog.text
