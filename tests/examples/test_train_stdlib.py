"""The training example runs as its docstring says, and the same seed gives the same model."""

import runpy
import sys
from pathlib import Path

from forks import in_a_fork
from quintet import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_stdlib.py"


def command(out: Path) -> list[str]:
    return [str(SCRIPT), "--out", str(out), "--steps", "2", "--files", "8"]


def test_two_runs_make_the_same_checkpoint_with_its_card(tmp_path: Path) -> None:
    def run(out: Path) -> str:
        def once() -> None:
            sys.argv = command(out)
            runpy.run_path(str(SCRIPT), run_name="__main__")

        ended = in_a_fork(once, tmp_path)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "bits per byte" in run(tmp_path / "one")
    run(tmp_path / "two")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| `xz -9`" in (tmp_path / "one" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    inputs = tokenizer("import", return_tensors="pt")
    assert model.generate(inputs, max_new_tokens=3).shape[0] == 1
