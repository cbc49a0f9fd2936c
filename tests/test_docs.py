"""The documentation does what it says: every page's code runs, its commands too.

A page is the README, the quickstart or a guide, also one that is added later. Its Python blocks run
one after the other in one process, as a reader would run them.
"""

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from forks import in_a_fork
from mission.conftest import checkpoint
from quintet.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
NEEDS_DOWNLOAD = "<!-- needs a download -->"
NEEDS_TOOLS = "<!-- make test-tools runs this -->"
FENCE = re.compile(
    rf"(?P<mark>(?:{re.escape(NEEDS_DOWNLOAD)}|{re.escape(NEEDS_TOOLS)})\s*)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHELLS = ("console", "bash", "sh", "shell")
# What stands for the models that pages name: a family, a head, and its labels.
HUB = {
    "Qwen/Qwen2.5-0.5B": ("qwen2", "ForCausalLM", None),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", "ForCausalLM", None),
    "Qwen/Qwen2-7B-Instruct": ("qwen2", "ForCausalLM", None),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": ("qwen2-moe", "ForCausalLM", None),
    "Zyphra/Zamba2-1.2B": ("zamba2", "ForCausalLM", None),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("deepseek-v2", "ForCausalLM", None),
    "deepseek-ai/DeepSeek-R1": ("deepseek-v3", "ForCausalLM", None),
    "owner/deepseek-v2-classifier": ("deepseek-v2", "ForSequenceClassification", None),
    "owner/qwen2-nli": ("qwen2", "ForSequenceClassification", ("contradiction", "entailment")),
    "owner/qwen2-ner": ("qwen2", "ForTokenClassification", ("O", "B-PER", "I-PER")),
    "owner/qwen2-qa": ("qwen2", "ForQuestionAnswering", None),
}


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    line: int
    needs_download: bool
    needs_tools: bool = False


def blocks(text: str) -> list[Block]:
    return [
        Block(
            found["kind"],
            found["body"],
            text.count("\n", 0, found.start("kind")) + 1,
            NEEDS_DOWNLOAD in (found["mark"] or ""),
            NEEDS_TOOLS in (found["mark"] or ""),
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """Return the lines of a block that run quintet, with or without a prompt before them."""
    joined = block.body.replace("\\\n", " ")
    lines = (line.removeprefix("$ ").strip() for line in joined.splitlines())
    return [line for line in lines if re.match(r"quintet |.*\| quintet ", line)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    return blocks(page.read_text(encoding="utf-8"))


WITH_PYTHON = [page for page in PAGES if any(b.kind == "python" for b in blocks_of(page))]
COMMANDS = [
    pytest.param(command, id=f"{name_of(page)}-line-{block.line}-{command}")
    for page in PAGES
    for block in blocks_of(page)
    if block.kind in SHELLS and not block.needs_download
    for command in commands(block)
]


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the models that pages name are small ones."""
    root = tmp_path_factory.mktemp("hub")
    for name, (family, head, labels) in HUB.items():
        (root / name).parent.mkdir(exist_ok=True)
        changes = {} if labels is None else {"id2label": dict(enumerate(labels))}
        checkpoint(root / name, family, head, **changes)
    return root


@pytest.fixture
def where(hub: Path, tmp_path: Path) -> Path:
    """A folder of its own with the hub's models in it."""
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    return tmp_path


def execute(page: Path, chosen: list[Block]) -> None:
    """Run blocks in one namespace; an error names the page's own line."""
    names = {"__name__": "__main__"}
    for block in chosen:
        body = "\n" * (block.line - 1) + block.body
        exec(compile(body, page.name, "exec"), names)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page: Path, where: Path) -> None:
    run_python(page, where)


def run_python(page: Path, where: Path, tools: bool = False) -> None:
    """Run a page's Python, and with `tools` also that which needs them."""
    chosen = [block for block in blocks_of(page) if block.kind == "python"]
    for block in chosen:
        compile(block.body, f"{page.name}:{block.line}", "exec")
    chosen = [b for b in chosen if not b.needs_download and (tools or not b.needs_tools)]
    done = in_a_fork(lambda: execute(page, chosen), where)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, where: Path) -> None:
    given = "Hello\n"
    for part in command.split(" | "):
        words = shlex.split(part)
        if words[0] == "quintet":
            done = in_a_fork(lambda: main(words[1:]), where, given)  # noqa: B023
        else:
            done = subprocess.run(part, input=given, capture_output=True, text=True, shell=True)
        assert done.returncode == 0, done.stderr
        given = done.stdout
    assert given


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{name_of(page)}: {link}"


def test_blocks_and_marks_are_found() -> None:
    assert shutil.which("sh")
    text = (
        f"a\n```python\nx = 1\n```\n{NEEDS_DOWNLOAD}\n\n```console\n$ quintet info a \\\n  --json\n"
        "$ printf a | quintet chat b\n{}\n```\n"
    )
    python, console = blocks(text)
    assert (python.kind, python.body, python.line) == ("python", "x = 1\n", 2)
    assert not python.needs_download
    assert console.needs_download
    assert [line.split() for line in commands(console)] == [
        ["quintet", "info", "a", "--json"],
        ["printf", "a", "|", "quintet", "chat", "b"],
    ]
