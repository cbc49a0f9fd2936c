"""The training example runs as its docstring says, and the same seed gives the same model."""

import runpy
import subprocess
import sys
from pathlib import Path

from forks import in_a_fork
from quintet import AutoModelForCausalLM, AutoTokenizer
from waiting import PATIENCE

SCRIPT = Path(__file__).parents[2] / "examples" / "train_stdlib.py"


def command(out: Path) -> list[str]:
    return [str(SCRIPT), "--out", str(out), "--steps", "2", "--files", "20"]


def test_two_runs_make_the_same_checkpoint_with_its_card(tmp_path: Path) -> None:
    def again() -> None:
        sys.argv = command(tmp_path / "two")
        runpy.run_path(str(SCRIPT), run_name="__main__")

    said = subprocess.run(
        [sys.executable, *command(tmp_path / "one")],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    ).stdout
    ended = in_a_fork(again, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "bits per byte" in said
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| `xz -9`" in (tmp_path / "one" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    inputs = tokenizer("import", return_tensors="pt")
    assert model.generate(inputs, max_new_tokens=3).shape[0] == 1
