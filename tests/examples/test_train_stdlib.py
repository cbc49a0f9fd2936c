"""The training example runs as its docstring says, and the same seed gives the same model."""

import os
from pathlib import Path

from programs import Programs
from quintet import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_stdlib.py"


def run(programs: Programs, out: Path) -> str:
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    options = ["--out", str(out), "--steps", "2", "--files", "20"]
    done = programs.run(["-c", code, *options], os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_runs_make_the_same_checkpoint_with_its_card(
    programs: Programs, tmp_path: Path
) -> None:
    said = run(programs, tmp_path / "one")
    run(programs, tmp_path / "two")
    assert "bits per byte" in said
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "| `xz -9`" in (tmp_path / "one" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    inputs = tokenizer("import", return_tensors="pt")
    assert model.generate(inputs, max_new_tokens=3).shape[0] == 1
