"""Writes `metrics.jsonl` and `samples.jsonl`.

A line is written whole or not at all, and stays. Where a run goes on from a checkpoint, lines of
steps behind it are cut off, so that no step is there twice. docs/guides/training.md has the fields.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from quintet import __version__
from quintet.errors import CheckpointError, InputError, ModelNotFoundError, SaveError, shown
from quintet.measurement.flops import TrainingFlops
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.sizes import measure
from quintet.training.records import (
    Beginning,
    End,
    Evaluation,
    GeneratedSample,
    Reporter,
    Saved,
    StepRecord,
)

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# No line of ours is longer; what is has been written by something else.
LONGEST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSettings:
    """The `[report]` table: the outputs of a training.

    Attributes:
        every: after how many steps there is a line in `metrics.jsonl`; steps that were left out
            have one in any case.
        peak_flops: the operations a second that the machine could do, of which metrics tell the
            share as `mfu`; None to leave that out of a training from Python, and to measure it
            for one by `quintet train`.
    """

    every: int = 1
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"[report] every = {self.every}: it has to be at least 1")
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise InputError(f"[report] peak_flops = {self.peak_flops}: it has to be above 0")


class MachineUsage:
    """The share of a machine's peak that a training's steps use: MFU.

    What counts as an operation is said in `quintet.measurement.flops`.
    """

    def __init__(self, model: CausalLMHead, peak: float | None) -> None:
        self._flops = {ahead: TrainingFlops(model, ahead) for ahead in (False, True)}
        self.peak = peak

    def flops(self, record: StepRecord) -> float:
        """Return the operations of a step."""
        ahead = any(name.startswith("prediction") for name in record.terms)
        return record.step_tokens * self._flops[ahead].of_token(max(1, record.context))

    def mfu(self, record: StepRecord) -> float | None:
        """Return the share of the peak; None if that is not known."""
        if self.peak is None or record.seconds <= 0:
            return None
        return self.flops(record) / record.seconds / self.peak


class _Lines:
    """A file of JSON, a line an object."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Remove the lines of later steps than this one, and half a line at the end."""
        try:
            with self.path.open("r+b") as file:
                end = 0
                for line in file:
                    record = _parsed(line)
                    if record is None or record.get("step", 0) > step:
                        file.truncate(end)
                        break
                    end += len(line)
        except FileNotFoundError:
            return

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line; a disk that is full leaves the file as it was.

        Raises:
            OSError: it cannot be written.
        """
        line = (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(handle).st_size
            try:
                if os.write(handle, line) < len(line):
                    raise OSError(28, "No space left on device", str(self.path))
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a run's metrics; None if it is incomplete or another kind of line."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(value, dict) and type(value.get("step", 0)) is int
    return value if is_line else None


def _is_record(value: Mapping[str, Any]) -> bool:
    """Return whether a line has an event, with numbers where a run writes numbers."""
    event = value.get("event")
    if event in ("step", "evaluation") and not ("step" in value and "tokens" in value):
        return False
    tables = [value.get(name) or {} for name in ("terms", "balance", "learning_rates")]
    numbers = [value.get(name) for name in ("tokens", "elapsed")]
    return (
        isinstance(event, str)
        and all(isinstance(table, dict) for table in tables)
        and all(_is_number(number) for table in tables for number in table.values())
        and all(_is_number(number) for number in numbers)
    )


def _is_number(value: object) -> bool:
    # None is what JSON has for a number that is none.
    return value is None or type(value) in (int, float)


def _finite(value: Any) -> Any:
    """Return a value for JSON: null stands for numbers that it lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path | torch.dtype) else value


class Metrics:
    """A reporter that writes `metrics.jsonl` and `samples.jsonl` into a run's folder.

    A disk on which nothing can be written ends no training: `told` hears of it once, and lines
    come again when there is room.
    """

    def __init__(self, settings: ReportSettings, reporter: Reporter) -> None:
        self.settings, self._reporter = settings, reporter
        self._metrics: _Lines | None = None
        self._samples: _Lines | None = None
        self._usage: MachineUsage | None = None
        self._failed = False

    def started(self, beginning: Beginning) -> None:
        """Cut off the steps to be repeated, and write the beginning."""
        folder, model = beginning.folder, beginning.model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics, self._samples = _Lines(folder / METRICS), _Lines(folder / SAMPLES)
            for lines in (self._metrics, self._samples):
                lines.cut(beginning.step)
        except OSError as error:
            raise SaveError(
                f"could not write metrics into {shown(str(folder))}: {error.strerror or error}"
            ) from error
        if isinstance(model, CausalLMHead):
            self._usage = MachineUsage(model, self.settings.peak_flops)
        size = measure(model, model.dtype)
        # The model itself is no number, and `asdict` would copy it.
        known = {f.name: getattr(beginning, f.name) for f in fields(beginning)}
        del known["model"]
        self._write(
            self._metrics,
            {
                "event": "start",
                "quintet": __version__,
                **known,
                "model_type": model.config.model_type,
                "parameters": size.parameters,
                "active_parameters": size.active,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "peak_flops": self.settings.peak_flops,
            },
        )

    def step(self, record: StepRecord) -> None:
        """Write a step, where its turn has come."""
        if record.step % self.settings.every and record.skipped is None and record.done < 1:
            return
        line = {"event": "step", **asdict(record)}
        line["tokens_per_second"] = record.tokens_per_second
        if self._usage is not None:
            line["flops"] = self._usage.flops(record)
            line["mfu"] = self._usage.mfu(record)
        self._write(self._metrics, line)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Write an evaluation."""
        line = {"event": "evaluation", **asdict(evaluation), "perplexity": evaluation.perplexity}
        self._write(self._metrics, line)

    def sampled(self, sample: GeneratedSample) -> None:
        """Write the model's texts into a file of their own."""
        self._write(self._samples, asdict(sample))

    def saved(self, saved: Saved) -> None:
        """Write where a checkpoint is."""
        self._write(self._metrics, {"event": "saved", **asdict(saved)})

    def warned(self, message: str) -> None:
        """Write a warning."""
        self._write(self._metrics, {"event": "warning", "message": message})

    def ended(self, end: End) -> None:
        """Write how it ended."""
        self._write(self._metrics, {"event": "end", **asdict(end)})

    def _write(self, lines: _Lines | None, line: Mapping[str, Any]) -> None:
        if lines is None:
            return
        try:
            lines.write(line)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._reporter.warned(
                    f"{lines.path} cannot be written ({error.strerror or error}); the training "
                    "goes on without"
                )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, given its folder or the file itself.

    Half a line at the end, which a run that was killed may leave, is left out.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: a line is none of a run's metrics.
    """
    path = run / METRICS if run.is_dir() else run
    records: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                value = _parsed(line) if len(line) <= LONGEST else None
                if value is not None and _is_record(value):
                    records.append(value)
                elif line.endswith(b"\n"):
                    raise CheckpointError(
                        f"{path}, line {number}: {shown(line[:80])} is no line of metrics"
                    )
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"there is no {METRICS} in {shown(str(run))}; name the folder that a training writes, "
            "`folder` of its [train] table"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return records
