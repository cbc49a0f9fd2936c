"""Small files are written whole, with the rights of any other file, whatever other threads do."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from quintet.errors import SaveError
from quintet.files import copy_file, write_text, write_texts


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The rights that are taken from every new file."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="rights are of POSIX")
def test_a_file_has_the_rights_of_a_plain_one(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "one", "1")
    write_texts(tmp_path / "folder", {"two": "2"})
    copy_file(tmp_path / "one", tmp_path / "three")
    for path in (tmp_path / "one", tmp_path / "folder" / "two", tmp_path / "three"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "one", "three"]


@pytest.mark.skipif(os.name == "nt", reason="rights are of POSIX")
def test_files_of_other_threads_keep_their_rights(umask: int, tmp_path: Path) -> None:
    seen: set[int] = set()
    goes_on = True

    def make_others() -> None:
        number = 0
        while goes_on:
            path = tmp_path / f"other-{number}"
            path.touch()
            seen.add(path.stat().st_mode & 0o777)
            number += 1

    thread = threading.Thread(target=make_others)
    thread.start()
    for number in range(20):
        write_text(tmp_path / "mine", str(number))
    goes_on = False
    thread.join()
    assert seen == {0o666 & ~umask}


def test_the_umask_is_never_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # To ask for it is to set it, for a moment, for all threads.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask was set"))
    write_text(tmp_path / "one", "1")
    assert (tmp_path / "one").read_text() == "1"


def test_what_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SaveError):
        write_texts(tmp_path, {"one": "new", "taken": "2"})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
