"""`quintet train`: a file to a run, what is said of it, and how it goes on."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quintet.cli import train_report
from quintet.cli.terminal import CLEAR
from quintet.cli.train import EXAMPLES
from quintet.cli.train_report import Console, clock, measured
from quintet.measurement import machine
from quintet.training.config import TrainingConfig
from quintet.training.metrics import read_metrics
from quintet.training.records import Evaluation, StepRecord
from quintet.training.settings import build, parse, written
from trainings import material, settings
from waiting import PATIENCE


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring what the machine could do takes longer than these trainings."""
    monkeypatch.setattr(machine, "gemm_peak", lambda dtype, budget: 1e11)


@pytest.fixture
def toml(texts: Path, tmp_path: Path) -> Path:
    """A file of a training of six steps."""
    path = tmp_path / "train.toml"
    held = {"held_out_sources": [{"paths": [str(texts / "held.txt")]}]}
    looks = {"every": 3, "prompts": ["Hello"], "max_new_tokens": 2}
    config = settings(texts, tmp_path / "run", data=held, evaluation=looks)
    path.write_text(written(config))
    return path


def test_a_run_from_its_file(quintet: Any, toml: Path, tmp_path: Path) -> None:
    result = quintet("train", toml)
    assert result.code == 0
    path = Path(result.out.strip())
    assert path.parent == tmp_path / "run"
    assert quintet("generate", "-m", path, "Hello", "-n", "2").code == 0
    said = result.err
    assert re.search(r"^model    qwen2, [\d,]+ parameters; float32 on cpu$", said, re.M)
    assert re.search(r"^data     8 documents, [\d,]+ tokens$", said, re.M)
    assert re.search(
        r"^steps    6 of 48 tokens each, 288 in all: the data [\d.]+ times$", said, re.M
    )
    assert re.search(
        r"^memory   about .* weights .* gradients .* optimiser .* activations$", said, re.M
    )
    assert re.search(r"^machine  1 thread\(s\), kernels: .*; products at 100 GFLOP/s$", said, re.M)
    assert re.search(
        r"^ 50.0%  step 3/6  loss [\d.]+  [\d,]+ tok/s  MFU \d+%  norm [\d.]+  lr 3.0e-03  "
        r"\d:\d\d left$",
        said,
        re.M,
    )
    assert re.search(r"^step 6: held out [\d.]+ bits per byte, perplexity ", said, re.M)
    assert re.search(r"^step 3 writes: Hello ▸ ", said, re.M)
    assert f"try it: quintet generate -m {path} PROMPT" in said
    steps = [line for line in read_metrics(tmp_path / "run") if line["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(
        step["mfu"] == pytest.approx(step["flops"] / step["seconds"] / 1e11) for step in steps
    )


def test_quiet_is_nothing_but_where_it_is(quintet: Any, toml: Path) -> None:
    result = quintet("train", toml, "--quiet", "--set", "train.steps=2")
    assert (result.code, result.err) == (0, "")
    assert result.out.strip().endswith("step-00000002")


def test_a_dry_run_reads_everything_and_writes_nothing(
    quintet: Any, toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quintet("train", toml, "--dry-run", "--set", "train.parts=3")
    assert result.code == 0
    assert "steps    6 of 48 tokens each in 3 parts" in result.out
    assert "nothing was trained" in result.out
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        small = machine.Machine("", 1, 1000, "", "", "")
        patch.setattr(machine.Machine, "here", lambda: small)
        result = quintet("train", toml, "--dry-run")
    assert result.code == 5
    assert "recompute = true" in result.err
    assert quintet("train", toml, "--dry-run", "--set", "data.context=64").code == 2


def test_a_dry_run_of_a_checkpoint_and_an_adapter_is_that_of_the_run(
    quintet: Any, toml: Path, texts: Path, tmp_path: Path
) -> None:
    trained = quintet("train", toml, "-q", "--set", "train.steps=1").out.strip()
    tables = {"model": {"config": None, "from": trained}, "adapter": {"r": 2}}
    config = settings(texts, tmp_path / "adapted", train={"steps": 1}, **tables)
    path = tmp_path / "adapter.toml"
    path.write_text(written(config))
    planned = quintet("train", path, "--dry-run").out.splitlines()
    said = quintet("train", path).err.splitlines()
    # The same of model, data, steps and memory.
    assert planned[:4] == [
        line for line in said if line[:8].strip() in ("model", "data", "steps", "memory")
    ]
    assert re.search(r"parameters, [\d,]+ trained \(\d+\.\d+%\)", planned[0])


def test_ctrl_c_saves_and_says_how_to_go_on(
    quintet: Any, toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(quintet("train", toml, "-q").out.strip())
    other = ("--set", f"train.folder={tmp_path / 'other'}")
    heard = Console.step

    def interrupt(console: Console, record: StepRecord) -> None:
        heard(console, record)
        if record.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            result = quintet("train", toml, *other)
        finally:
            signal.signal(signal.SIGINT, before)
    assert result.code == 130
    assert result.is_one_screen
    assert (
        f"go on: quintet train {toml} --set train.folder={tmp_path / 'other'} --resume"
        in result.err
    )
    refused = quintet("train", toml, *other)
    assert refused.code == 2
    assert "--resume" in refused.err
    result = quintet("train", toml, *other, "--resume")
    assert result.code == 0
    assert "going on from step 2" in result.err
    weights = Path(result.out.strip()) / "model.safetensors"
    assert weights.read_bytes() == (whole / "model.safetensors").read_bytes()
    told = read_metrics(tmp_path / "other")
    steps = [line["step"] for line in told if line["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    written_down = (tmp_path / "other" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written_down] == [3, 6]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nowhere.toml"], 3, "there is no file 'nowhere.toml'"),
        ([], 2, "quintet train --example pretrain > train.toml"),
        (
            ["{}", "--set", "train.stepz=3"],
            4,
            "[train] stepz: there is no such key; the nearest is steps",
        ),
        (["{}", "--set", "train.steps=many"], 4, "[train] steps = "),
        (["{}", "--set", "model.config.model_type=gpt2"], 3, "gpt2"),
        (["{}", "--set", "data.sources=[{paths=['/nowhere']}]"], 3, "/nowhere"),
        (["plot", "/nowhere"], 3, "no metrics.jsonl in '/nowhere'"),
    ],
)
def test_what_is_wrong_is_said_in_one_screen(
    quintet: Any, toml: Path, arguments: list[str], code: int, told: str
) -> None:
    result = quintet(
        "train",
        *(argument.format(toml) if argument == "{}" else argument for argument in arguments),
    )
    assert result.code == code
    assert result.is_one_screen
    assert told in result.err


def test_plots_of_runs(quintet: Any, toml: Path, tmp_path: Path) -> None:
    result = quintet("train", toml, "-q", "--plot")
    assert result.code == 0
    assert "held out, bits per byte" in result.out
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    result = quintet(
        "train", "plot", tmp_path / "run", "--out", tmp_path / "x.png", "--by", "steps"
    )
    assert result.code == 0
    assert "steps" in result.out
    assert f"written {tmp_path / 'x.png'}" in result.err


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_to_begin_with_is_one_of_settings(quintet: Any, name: str) -> None:
    result = quintet("train", "--example", name)
    assert (result.code, result.err) == (0, "")
    assert f"quintet train {'continue' if name == 'continue' else name}.toml" in result.out
    build(TrainingConfig, parse(result.out))
    assert max(map(len, result.out.splitlines())) <= 110


def test_help_imports_no_torch_and_no_plots() -> None:
    script = (
        "import sys; from quintet.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'plotext'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, timeout=PATIENCE
    )


def test_a_time_and_a_measurement_in_words() -> None:
    assert [clock(seconds) for seconds in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    told = Evaluation(bits_per_token=2.0, scored=1, agreement=0.5, balance={"a": 1.0, "b": 0.5})
    assert measured(told) == (
        "held out 2.0000 bits per token, perplexity 4.00, the prediction layer agrees on 50%, "
        "MaxVio 0.75 (0:00)"
    )


def test_at_a_terminal_one_line_moves_and_others_stay_above_it(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(train_report, "width", lambda stream: 40)
    monkeypatch.setattr(train_report, "MOVES", 0.0)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console(settings(texts, tmp_path / "run"))
    common: Any = {"tokens": 1, "step_tokens": 9, "context": 8, "seconds": 1.0, "loss": 2.0}
    console.step(StepRecord(step=1, done=0.25, **common))
    console.step(StepRecord(step=2, done=0.5, **common))
    console.step(StepRecord(step=3, done=0.75, skipped="its loss is not finite", **common))
    console.step(StepRecord(step=4, done=1.0, **common))
    console.warned("careful")
    said = capsys.readouterr().err
    moved = [line for line in said.split(CLEAR) if line]
    assert [line[:14] for line in moved] == [
        " 25.0%  step 1",
        " 50.0%  step 2",
        "step 3 is left",
        "100.0%  step 4",
        "careful\n",
    ]
    assert all(len(line) < 40 for line in moved if "%" in line)
    assert said.count("\n") == 2
