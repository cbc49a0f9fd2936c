"""Small files are written whole, with the rights of any other file, whatever other threads do."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quintet import AutoConfig, AutoTokenizer, GenerationConfig
from quintet.checkpoint import Checkpoint
from quintet.errors import CheckpointError, QuintetError, SaveError
from quintet.files import (
    BYTES_A_VALUE,
    MAX_LISTING_BYTES,
    MAX_SETTINGS_BYTES,
    copy_file,
    read_json,
    read_limited,
    read_text,
    write_text,
    write_texts,
)


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


# What is read as JSON by what limits the values, too; then the others.
OBJECTS = [
    *(
        (name, MAX_SETTINGS_BYTES, AutoTokenizer.from_pretrained)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    ),
    ("vocab.json", MAX_LISTING_BYTES, AutoTokenizer.from_pretrained),
    ("config.json", MAX_SETTINGS_BYTES, AutoConfig.from_pretrained),
    ("generation_config.json", MAX_SETTINGS_BYTES, GenerationConfig.from_pretrained),
]
FILES = [
    *OBJECTS,
    ("model.safetensors.index.json", MAX_LISTING_BYTES, Checkpoint.open),
    ("chat_template.jinja", MAX_SETTINGS_BYTES, AutoTokenizer.from_pretrained),
    *(
        (name, MAX_LISTING_BYTES, AutoTokenizer.from_pretrained)
        for name in ("tokenizer.json", "merges.txt", "tokenizer.model")
    ),
]


def put_beside(name: str, folder: Path) -> None:
    """Write what else a tokenizer has, so that the file `name` is looked at."""
    if not name.startswith("tokenizer."):
        beside = {"vocab.json": "{}", "merges.txt": ""}
        beside["tokenizer_config.json"] = '{"tokenizer_class": "Qwen2Tokenizer"}'
        for other, content in beside.items():
            (folder / other).write_text(content)


@pytest.mark.parametrize(("name", "most", "read"), FILES)
def test_a_file_larger_than_any_honest_one_is_not_read(
    name: str, most: int, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    put_beside(name, tmp_path)
    with (tmp_path / name).open("w") as file:
        file.truncate(most + 1)
    said = f"{re.escape(name)}: .* more than the limit of {most:,}"
    with pytest.raises(QuintetError, match=said):
        read(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no such device")
def test_what_has_no_size_is_read_to_the_limit() -> None:
    for read in (read_limited, read_text, read_json):
        with pytest.raises(CheckpointError, match="/dev/zero: it has more than the limit of 1,000"):
            read(Path("/dev/zero"), 1_000)


@pytest.mark.parametrize(("name", "most", "read"), OBJECTS)
def test_a_file_of_more_values_than_any_honest_one_is_not_parsed(
    name: str, most: int, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    put_beside(name, tmp_path)
    most //= BYTES_A_VALUE
    (tmp_path / name).write_text('{"one": [' + "0," * most + "0]}")
    with pytest.raises(QuintetError, match=f"values are more than the limit of {most:,}"):
        read(tmp_path)
