"""The training example runs as its docstring says, and the same seed gives the same model."""

import subprocess
import sys
from pathlib import Path

from quintet import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_stdlib.py"


def run(out: Path) -> str:
    command = [sys.executable, SCRIPT, "--out", out, "--steps", "2", "--files", "20"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_two_runs_make_the_same_checkpoint_with_its_card(tmp_path: Path) -> None:
    said = run(tmp_path / "one")
    run(tmp_path / "two")
    assert "bits per byte" in said
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| `xz -9`" in (tmp_path / "one" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    inputs = tokenizer("import", return_tensors="pt")
    assert model.generate(inputs, max_new_tokens=3).shape[0] == 1
