"""The code of the five pages of documentation that this project implements, block by block."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "Block", "Run", "blocks", "run", "script"]

FOLDER = Path(__file__).parent / "pages"
PAGES = tuple(sorted(path.stem for path in FOLDER.glob("*.md")))
FENCE = re.compile(r"^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a page: where it stands, its kind, and its text."""

    page: str
    line: int
    kind: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}-line-{self.line}"


@dataclass(frozen=True)
class Run:
    """What code leaves behind: its names, and the values its lines showed at a prompt."""

    names: dict[str, Any]
    shown: list[Any]


def blocks(page: str, *kinds: str) -> list[Block]:
    """Return the blocks of a page in its order, of some kinds or all."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match["kind"], match["body"])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if not kinds or block.kind in kinds]


def script(block: Block) -> str:
    """Return the code of a block, without the prompts and outputs of a session."""
    if block.kind != "pycon":
        return block.body
    lines = (line for line in block.body.splitlines() if re.match(r">>>|\.\.\. ", line))
    return "\n".join(line[4:] for line in lines) + "\n"


def run(code: str, name: str, **names: Any) -> Run:
    """Run code, statement by statement as at a prompt."""
    shown = []
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), name, "eval"), names)
            if value is not None:
                shown.append(value)
        else:
            exec(compile(ast.Module([statement], []), name, "exec"), names)
    return Run(names, shown)
