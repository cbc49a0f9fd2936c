"""The guide to generation does what it says."""

import contextlib
import io
import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "generation.md"


def test_the_blocks_run_one_after_another() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 7
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n".join(blocks), str(GUIDE), "exec"), {"__name__": "guide"})
    printed = out.getvalue()
    assert printed.count("def read_lines(path):") == 1 + 2 + 2 + 1 + 1
    assert "GenerateBeamDecoderOnlyOutput" in printed
