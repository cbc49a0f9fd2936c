"""Lines of JSON that stay whole, and are cut where a run goes on."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from quintet.errors import CheckpointError, InputError, ModelNotFoundError
from quintet.training.metrics import Metrics, ReportSettings, read_metrics
from quintet.training.records import (
    Beginning,
    End,
    Evaluation,
    GeneratedSample,
    Reporters,
    Saved,
    Silent,
    StepRecord,
)


class Heard(Silent):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def record(step: int, **more: Any) -> StepRecord:
    values: dict[str, Any] = {
        **{"step": step, "tokens": 16 * step, "done": step / 10, "step_tokens": 16, "context": 8},
        **{"seconds": 0.5, "elapsed": step / 2, "loss": 2.5, "grad_norm": 1.0},
    }
    return StepRecord(**{**values, **more})


def begin(folder: Path, model: Any, step: int = 0, **settings: Any) -> tuple[Metrics, Heard]:
    heard = Heard()
    metrics = Metrics(ReportSettings(**settings), heard)
    metrics.started(Beginning(folder=folder, model=model, step=step, settings={"a": {"b": 1}}))
    return metrics, heard


def test_each_event_is_a_line(tmp_path: Path, predicting: Any) -> None:
    metrics, heard = begin(tmp_path, predicting, peak_flops=1e9)
    teller = Reporters(Silent(), metrics)
    plain = record(1, terms={"next_token": 2.5}, balance={"r": 0.5}, learning_rates={"muon": 1e-3})
    teller.step(plain)
    teller.step(record(2, terms={"next_token": 2.0, "prediction": 3.0}))
    teller.evaluated(Evaluation(step=2, tokens=32, scored=5, bits_per_token=3.0, bits_per_byte=1.0))
    teller.saved(Saved(step=2, path=tmp_path / "step-2", best=True))
    teller.warned("careful")
    teller.ended(End(reason="done", step=2, tokens=32, seconds=1.0))
    start, first, second, evaluation, saved, warning, end = read_metrics(tmp_path)
    assert (start["event"], start["model_type"], start["settings"]) == (
        "start",
        "deepseek_v3",
        {"a": {"b": 1}},
    )
    assert 0 < start["active_parameters"] < start["parameters"]
    assert (first["loss"], first["tokens_per_second"], first["balance"]) == (2.5, 32.0, {"r": 0.5})
    assert first["mfu"] == pytest.approx(first["flops"] / 0.5 / 1e9)
    # A prediction layer that is trained is work, too.
    assert second["flops"] > 1.2 * first["flops"]
    assert (evaluation["perplexity"], evaluation["bits_per_byte"]) == (8.0, 1.0)
    assert (saved["best"], warning["message"], end["reason"]) == (True, "careful", "done")
    assert heard.warnings == []


def test_where_a_run_goes_on_no_step_is_there_twice(tmp_path: Path, predicting: Any) -> None:
    metrics, _ = begin(tmp_path, predicting)
    for step in range(1, 8):
        metrics.step(record(step, loss=float(step)))
        metrics.sampled(GeneratedSample(step=step, tokens=0, prompt="a", text="b", seed=0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step"')
    assert [line.get("step") for line in read_metrics(tmp_path)] == [*range(8)]
    metrics, _ = begin(tmp_path, predicting, step=4)
    metrics.step(record(5, loss=50.0))
    told = read_metrics(tmp_path)
    assert [line["step"] for line in told] == [0, 1, 2, 3, 4, 4, 5]
    assert told[-1]["loss"] == 50.0
    written = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4]


def test_texts_are_in_a_file_of_their_own(tmp_path: Path, predicting: Any) -> None:
    metrics, _ = begin(tmp_path, predicting)
    assert not (tmp_path / "samples.jsonl").exists()
    metrics.sampled(GeneratedSample(step=1, tokens=0, prompt="secret", text="said", seed=0))
    assert "secret" not in (tmp_path / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"] == "said"


def test_every_so_many_steps_and_whatever_was_left_out(tmp_path: Path, predicting: Any) -> None:
    metrics, _ = begin(tmp_path, predicting, every=4)
    for step in range(1, 11):
        why = "the loss is nan" if step == 3 else None
        metrics.step(record(step, skipped=why, loss=math.nan if why else 1.0))
    told = read_metrics(tmp_path)[1:]
    assert [line["step"] for line in told] == [3, 4, 8, 10]
    # JSON has no number for it.
    assert told[0]["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_full_disk_is_told_once_and_leaves_whole_lines(
    tmp_path: Path, predicting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, heard = begin(tmp_path, predicting)
    metrics.step(record(1))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        metrics.step(record(2))
        metrics.step(record(3))
    metrics.step(record(4))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 4]
    assert len(heard.warnings) == 1
    assert "metrics.jsonl cannot be written (No space left on device)" in heard.warnings[0]


def test_what_others_wrote_is_cut_off(tmp_path: Path, predicting: Any) -> None:
    for line in ("[]", '{"step": {}}', '{"step": "2"}', '{"step": true}'):
        (tmp_path / "samples.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 1}\n')
        begin(tmp_path, predicting, step=2)
        assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n'


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no metrics.jsonl in"):
        read_metrics(tmp_path)
    for line in (
        *("hello", '{"event": "step"}', '{"event": "step", "step": 1, "tokens": "many"}'),
        *('{"event": "start", "balance": [1]}', '{"event": "start", "terms": {"z": "1"}}'),
    ):
        (tmp_path / "metrics.jsonl").write_text(f'{{"event": "start"}}\n{line}\n')
        with pytest.raises(CheckpointError, match=f"line 2: b'{re.escape(line)}"):
            read_metrics(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("peak_flops", 0.0)])
def test_settings_that_mean_nothing(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"\[report\] {name} = {value}"):
        ReportSettings(**{name: value})
