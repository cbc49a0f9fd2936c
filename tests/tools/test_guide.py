"""The page about tools does what it says, that too which needs them installed."""

from pathlib import Path

from outside import tool
from test_docs import ROOT, run_python

for name in ("datasets", "langchain_huggingface", "lm_eval", "outlines", "trl", "xgrammar"):
    tool(name)


def test_its_python_runs(tmp_path: Path) -> None:
    run_python(ROOT / "docs" / "guides" / "ecosystem.md", tmp_path, tools=True)
