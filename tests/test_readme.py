"""The README does what it says: its code blocks run, its commands too."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
NEEDS_DOWNLOAD = "<!-- needs a download -->"
FENCE = re.compile(
    rf"(?P<mark>{re.escape(NEEDS_DOWNLOAD)}\s*)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    line: int
    needs_download: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(
            found["kind"],
            found["body"],
            text.count("\n", 0, found.start("kind")) + 1,
            found["mark"] is not None,
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """Return the `quintet …` lines of a block, with or without a prompt before them."""
    joined = block.body.replace("\\\n", " ")
    lines = (line.removeprefix("$ ").strip() for line in joined.splitlines())
    return [line for line in lines if line.startswith("quintet ")]


TEXT = README.read_text(encoding="utf-8")
PYTHON = [block for block in blocks(TEXT) if block.kind == "python"]
COMMANDS = [
    pytest.param(command, id=f"line-{block.line}-{command}")
    for block in blocks(TEXT)
    if block.kind in ("console", "bash", "sh", "shell") and not block.needs_download
    for command in commands(block)
]


def run(arguments: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=where,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_readme_shows_python() -> None:
    assert PYTHON, f"{README} has no ```python block"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line-{block.line}")
def test_python_runs(block: Block, tmp_path: Path) -> None:
    compile(block.body, f"{README.name}:{block.line}", "exec")
    if not block.needs_download:
        done = run([sys.executable, "-c", block.body], tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, tmp_path: Path) -> None:
    call = "from quintet.cli.main import main; main()"
    arguments = shlex.split(command, comments=True)[1:]
    done = run([sys.executable, "-c", call, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_blocks_and_marks_are_found() -> None:
    text = (
        f"a\n```python\nx = 1\n```\n{NEEDS_DOWNLOAD}\n\n```console\n$ quintet info a \\\n  --json\n"
        "{}\n```\n"
    )
    python, console = blocks(text)
    assert (python.kind, python.body, python.line) == ("python", "x = 1\n", 2)
    assert not python.needs_download
    assert console.needs_download
    assert [shlex.split(line) for line in commands(console)] == [["quintet", "info", "a", "--json"]]
