"""The progress report of `quintet train`."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from quintet.cli.terminal import CLEAR, can_dim, can_move, dimmed, harmless, note, width

if TYPE_CHECKING:
    from quintet.training.config import TrainingConfig
    from quintet.training.metrics import MachineUsage
    from quintet.training.records import (
        Beginning,
        End,
        Evaluation,
        GeneratedSample,
        Saved,
        StepRecord,
    )

# A terminal's line is written anew at most so often; lines of a file come more seldom.
MOVES, LINES = 0.1, 30.0
# The share of the training after which a file gets a line in any case.
SHARE = 0.1
# How much of a mean the newest step is.
NEW = 0.1


class Console:
    """A reporter on standard error.

    Args:
        config: what is trained.
        quiet: say nothing.

    Attributes:
        path: the last checkpoint that it heard of.
    """

    def __init__(self, config: "TrainingConfig", quiet: bool = False) -> None:
        self._config, self._quiet = config, quiet
        self._moves = not quiet and width(sys.stderr) is not None and can_move()
        self._beginning: Beginning | None = None
        self._usage: MachineUsage | None = None
        self._clock = _Clock()
        self._loss = self._rate = math.nan
        self._shown_at, self._shown_done, self._open = -math.inf, 0.0, False
        self.path: Path | None = None

    def started(self, beginning: "Beginning") -> None:
        """Print the plan of a run, and its memory."""
        from quintet.cli.train_banner import banner
        from quintet.modeling.heads import CausalLMHead
        from quintet.training.metrics import MachineUsage

        self._beginning, peak = beginning, self._config.report.peak_flops
        if isinstance(beginning.model, CausalLMHead):
            self._usage = MachineUsage(beginning.model, peak)
        for line in banner(beginning, self._config):
            self._say(line)
        self._clock = _Clock()

    def step(self, record: "StepRecord") -> None:
        """Move the line, or write one where lines do not move."""
        self._clock.tick(record.done)
        if record.skipped is not None:
            self._say(f"step {record.step:,} is left out: {record.skipped}")
            return
        # What else is minimised has its own weight; the loss that others tell is the next token's.
        self._loss = _mean(self._loss, record.terms.get("next_token", record.loss))
        self._rate = _mean(self._rate, record.tokens_per_second)
        now = time.monotonic()
        waited = now - self._shown_at
        if self._moves:
            due = waited >= MOVES
        else:
            due = waited >= LINES or record.done - self._shown_done >= SHARE
        if not self._quiet and (due or record.done >= 1):
            self._shown_at, self._shown_done = now, record.done
            self._show(self._line(record))

    def evaluated(self, evaluation: "Evaluation") -> None:
        """Print an evaluation."""
        self._say(f"step {evaluation.step:,}: {measured(evaluation)}")

    def sampled(self, sample: "GeneratedSample") -> None:
        """Print the model's text."""
        self._say(
            f"step {sample.step:,} writes: {harmless(sample.prompt)} ▸ {harmless(sample.text)}"
        )

    def saved(self, saved: "Saved") -> None:
        """Print the place of a checkpoint."""
        self.path = saved.path
        self._say(f"saved {saved.path}{', the best so far' if saved.best else ''}")

    def warned(self, message: str) -> None:
        """Print a warning or a note."""
        self._say(message)

    def ended(self, end: "End") -> None:
        """Take the moving line away, and say how it ended."""
        if end.reason == "failed":
            self._close()
            return
        before = 0 if self._beginning is None else self._beginning.step
        taken = f"{end.step - before:,} steps" + (f" after {before:,} before" if before else "")
        how = "trained" if end.reason == "done" else "interrupted after"
        self._say(f"{how} {taken}, {end.tokens:,} tokens in all, {clock(end.seconds)}")

    def _line(self, record: "StepRecord") -> str:
        """Write a step in one line."""
        steps = None if self._beginning is None else self._beginning.steps
        cells = [
            f"{record.done:6.1%}",
            f"step {record.step:,}" + (f"/{steps:,}" if steps else ""),
            f"loss {self._loss:.4f}",
            f"{self._rate:,.0f} tok/s",
        ]
        mfu = None if self._usage is None else self._usage.mfu(record)
        if mfu is not None:
            cells.append(f"MFU {mfu:.0%}")
        if "reward_accuracy" in record.terms:
            cells.append(f"prefers {record.terms['reward_accuracy']:.0%}")
        cells.append(f"norm {record.grad_norm:.2f}")
        if record.learning_rates:
            cells.append(f"lr {max(record.learning_rates.values()):.1e}")
        if record.balance:
            mean = sum(record.balance.values()) / len(record.balance)
            cells.append(f"MaxVio {mean:.2f}")
        seconds_left = self._clock.left()
        if seconds_left is not None and record.done < 1:
            cells.append(f"{clock(seconds_left)} left")
        return "  ".join(cells)

    def _show(self, line: str) -> None:
        if not self._moves:
            note(line)
            return
        line = line[: (width(sys.stderr) or 80) - 1]
        sys.stderr.write(f"{CLEAR}{dimmed(line) if can_dim() else line}")
        sys.stderr.flush()
        self._open = True

    def _say(self, text: str) -> None:
        """Write a line that stays, above the one that moves."""
        self._close()
        note(text, self._quiet)

    def _close(self) -> None:
        if self._open:
            sys.stderr.write(CLEAR)
            self._open = False


class _Clock:
    """Estimates the remaining time."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def tick(self, done: float) -> None:
        """Show the progress; it begins behind the first step, which is slower than others."""
        self._last = (time.monotonic(), done)
        if self._first is None:
            self._first = self._last

    def left(self) -> float | None:
        """Return the seconds that are left, or None before there is anything to go by."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        seconds, share = (b - a for a, b in zip(self._first, self._last, strict=True))
        return seconds / share * max(0.0, 1 - self._last[1])


def measured(evaluation: "Evaluation") -> str:
    """Format an evaluation as a line."""
    cells = []
    if evaluation.bits_per_byte is not None:
        cells.append(f"{evaluation.bits_per_byte:.4f} bits per byte")
    else:
        cells.append(f"{evaluation.bits_per_token:.4f} bits per token")
    cells.append(f"perplexity {evaluation.perplexity:,.2f}")
    if evaluation.agreement is not None:
        cells.append(f"the prediction layer agrees on {evaluation.agreement:.0%}")
    if evaluation.balance:
        cells.append(f"MaxVio {sum(evaluation.balance.values()) / len(evaluation.balance):.2f}")
    return f"held out {', '.join(cells)} ({clock(evaluation.seconds)})"


def clock(seconds: float) -> str:
    """Write a time as a clock does."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def _mean(before: float, now: float) -> float:
    return now if math.isnan(before) else before + NEW * (now - before)
