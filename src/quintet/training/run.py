"""A running training: steps until the budget is spent, with reports, measures and saves."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from quintet.errors import DivergedError, SaveError
from quintet.files import write_text
from quintet.modeling.balance import BiasBalancer
from quintet.modeling.heads import CausalLMHead
from quintet.tokenization import PreTrainedTokenizer
from quintet.training import checkpoints
from quintet.training.batch import Batch
from quintet.training.building import expert_loads, token_dropping
from quintet.training.checkpoints import SavedCheckpoint
from quintet.training.config import TrainingConfig
from quintet.training.data import Data
from quintet.training.evaluation import evaluate, samples
from quintet.training.objective import Objective
from quintet.training.optimizers import build_optimizers
from quintet.training.optimizers.layout import Layout
from quintet.training.precision import computing
from quintet.training.progress import Progress
from quintet.training.ranks import Ranks
from quintet.training.records import Beginning, End, Evaluation, Reporter, Saved, StepRecord
from quintet.training.result import TrainingResult
from quintet.training.resuming import FORMAT, Resume, check_format, check_same, moved, surroundings
from quintet.training.schedules import schedule_of
from quintet.training.settings import plain, written
from quintet.training.signals import Stop, heeded
from quintet.training.state import Counters, Randomness
from quintet.training.step import StepOutcome, take
from quintet.training.writing import writing

T = TypeVar("T")

SETTINGS = "config.toml"


class Run:
    """The state of a training while it runs."""

    def __init__(
        self,
        config: TrainingConfig,
        folder: Path,
        model: CausalLMHead,
        tokenizer: PreTrainedTokenizer,
        objective: Objective,
        data: Data,
        report: Reporter,
        ranks: Ranks,
        layout: Layout,
    ) -> None:
        """Build the optimizers and balancer of a model that is ready to be trained."""
        self.config, self.folder, self.report = config, folder, report
        self.ranks, self.layout = ranks, layout
        self.model, self.tokenizer = model, tokenizer
        self.objective, self.data = objective, data
        self.counters = Counters()
        self.optimizers = build_optimizers(model, config.optimizer, layout)
        self.loads = expert_loads(model, config.balance)
        self.dropping = token_dropping(model, config.balance)
        rate = config.balance.bias
        self.rate = None if rate is None else schedule_of(rate)
        self.batches = schedule_of(config.train.batches)
        self.computing = partial(computing, config.optimizer.precision, model.device)
        self.path: Path | None = None
        self.loss: float | None = None
        self.evaluation: Evaluation | None = None
        self.unsaved: SaveError | None = None
        self._saved_at = time.monotonic()

    def whole(self, start: SavedCheckpoint | None, resume: Resume) -> TrainingResult:
        """Run all steps, from the beginning or a checkpoint.

        Raises:
            DivergedError: too many steps in a row were not finite.
            SaveError: the last checkpoint could not be written.
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        if start is not None:
            self._take_over(start, resume)
        if self.ranks.first:
            write_text(self.folder / SETTINGS, written(self.config))
        self.report.started(self._beginning())
        if self.config.evaluation.measures and not len(self.data.held_out):
            self.report.warned(
                "[evaluation] has nothing to measure by, as no document is held out; give [data] "
                "held_out a larger share of them, or name held_out_sources"
            )
        reason: Literal["done", "interrupted", "failed"] = "failed"
        try:
            with heeded(says=self.ranks.first) as stop:
                self._steps(stop)
                reason = "done" if stop.received is None else "interrupted"
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        finally:
            counters = self.counters
            self.report.ended(
                End(
                    reason=reason,
                    step=counters.step,
                    tokens=counters.tokens,
                    seconds=counters.seconds,
                    path=self.path,
                )
            )
        if self.unsaved is not None:
            raise self.unsaved
        stop.end()
        return self._result()

    # -- steps -------------------------------------------------------------------------------

    def _steps(self, stop: Stop) -> None:
        self.model.train()
        stopping = False
        while self._done() < 1 and not stopping:
            record = self._step()
            self.report.step(record)
            last = self._done() >= 1
            stopping, waited = self._agree(stop)
            due = last or self.config.evaluation.is_due(self.counters.step)
            evaluation = self._evaluate() if due and not stopping else None
            if last or stopping or waited or self._is_due(evaluation):
                self._save(evaluation)

    def _agree(self, stop: Stop) -> tuple[bool, bool]:
        """Return whether any process received a signal, and whether it is time to save."""
        waited = time.monotonic() - self._saved_at >= self.config.checkpoint.minutes * 60
        number, late = self.ranks.most(
            [0 if stop.received is None else int(stop.received), float(waited)]
        )
        if number and stop.received is None:
            stop.received = Signals(int(number))
        return bool(number), bool(late)

    def _step(self) -> StepRecord:
        """Take one step, and count it."""
        began, worked = time.perf_counter(), time.process_time()
        at, counters = self._progress(), self.counters
        batches, parts = self._read(at)
        found = take(
            self.model, self.objective, self.optimizers, parts, at, self.computing, self.ranks
        )
        balance = self._balance(found, at)
        tokens = self._tokens(parts)
        counters.step += 1
        counters.batches += batches
        counters.tokens += tokens
        counters.skipped = 0 if found.skipped is None else counters.skipped + 1
        seconds = time.perf_counter() - began
        # Of several processes, the longest counts.
        seconds, worked = self.ranks.most([seconds, time.process_time() - worked])
        counters.worked += worked
        counters.seconds += seconds
        record = StepRecord(
            step=counters.step,
            tokens=counters.tokens,
            done=self._done(),
            step_tokens=tokens,
            context=parts[0].input_ids.shape[1],
            seconds=seconds,
            elapsed=counters.seconds,
            loss=found.loss,
            terms=found.terms,
            learning_rates=self.optimizers.learning_rates(at),
            grad_norm=found.norm,
            balance=balance,
            skipped=found.skipped,
        )
        if found.skipped is None:
            self.loss = found.loss
        elif counters.skipped > self.config.train.skips:
            self.report.step(record)
            self._diverged(found.skipped)
        return record

    def _read(self, at: Progress) -> tuple[int, list[Batch]]:
        """Return the number of batches that a step reads, and all parts of these."""
        count = max(1, round(self.batches.at(at)))
        first = self.counters.batches
        parts = [
            part
            for number in range(first, first + count)
            for part in self.data.parts(
                replace(at, step=number), self.config.train.parts, self.ranks.share
            )
        ]
        return count, parts

    def _tokens(self, parts: list[Batch]) -> int:
        """Return the number of these tokens, those of other processes included."""
        own = sum(batch.tokens for batch in parts)
        return int(self.ranks.counted({"tokens": own})["tokens"])

    def _balance(self, found: StepOutcome, at: Progress) -> dict[str, float]:
        """Move the biases of routers against their loads; return how uneven these were."""
        if self.loads is None:
            return {}
        loads = self.ranks.summed(self.loads.loads())
        violations = self.loads.violations(loads)
        if isinstance(self.loads, BiasBalancer) and self.rate and found.skipped is None:
            self.loads.step(self.rate.at(at), loads)
        else:
            self.loads.clear()
        return violations

    def _diverged(self, why: str) -> None:
        last = "there is no checkpoint yet" if self.path is None else f"the last is {self.path}"
        raise DivergedError(
            f"{self.counters.skipped} steps in a row, the last of them step {self.counters.step}, "
            f"were left out, this one as {why}; no more than [train] skips = "
            f"{self.config.train.skips} may be; {last}. A lower learning_rate, a longer warm-up or "
            "a lower max_norm keep numbers finite"
        )

    def _progress(self) -> Progress:
        return Progress(self.counters.step, self.counters.tokens, min(self._done(), 1.0))

    def _done(self) -> float:
        """The share of the budget that is spent."""
        budget, counters = self.config.train, self.counters
        if budget.steps is not None:
            return counters.step / budget.steps
        if budget.tokens is not None:
            return counters.tokens / budget.tokens
        assert budget.minutes is not None
        return counters.worked / 60 / budget.minutes

    # -- looking -----------------------------------------------------------------------------

    def _evaluate(self) -> Evaluation | None:
        """Measure the model on held-out texts, and let it write."""
        settings, counters = self.config.evaluation, self.counters
        documents = settings.chosen(self.data.held_out)
        if documents:
            context = settings.context or self.data.context
            own = self._looking(
                partial(
                    evaluate,
                    self.model,
                    documents,
                    context,
                    step=counters.step,
                    tokens=counters.tokens,
                    of_layers=self.ranks.of_layers,
                )
            )
            # What follows from it is decided once, however processes round.
            found = Evaluation(**self.ranks.lead(lambda: asdict(own)))
            self.evaluation = found
            self.report.evaluated(found)
        written = partial(samples, self.model, self.tokenizer, settings)
        for sample in self._looking(
            lambda: list(written(step=counters.step, tokens=counters.tokens))
        ):
            self.report.sampled(sample)
        return self.evaluation if documents else None

    def _looking(self, look: Callable[[], T]) -> T:
        """Return the result of a call that looks at the model without gradients."""
        with torch.no_grad():
            return self.layout.run(look)

    # -- saving ------------------------------------------------------------------------------

    def _is_due(self, evaluation: Evaluation | None) -> bool:
        every = self.config.checkpoint.every
        by_steps = every is not None and self.counters.step % every == 0
        return by_steps or self._is_best(evaluation)

    def _is_best(self, evaluation: Evaluation | None) -> bool:
        if evaluation is None or not math.isfinite(evaluation.score):
            return False
        return self.counters.best is None or evaluation.score < self.counters.best

    def _save(self, evaluation: Evaluation | None) -> None:
        """Write a checkpoint; if that fails, the training and earlier checkpoints stay."""
        is_best, before = self._is_best(evaluation), self.counters.best
        if is_best and evaluation is not None:
            self.counters.best = evaluation.score
        self._saved_at = time.monotonic()
        state: dict[str, Any] = {
            "format": FORMAT,
            "settings": plain(self.config),
            "data": self.data.fingerprint(),
            "dtype": self._dtype(),
            "counters": self.counters.plain(),
            "random": Randomness.now().values,
            "surroundings": surroundings(self.ranks.axes),
        }
        others = self.ranks.collected(state["random"])[1:]
        if others:
            state["others"] = others
        if evaluation is not None and math.isfinite(evaluation.score):
            state["score"] = evaluation.score
        # All take part in making tensors whole; the first has and writes them.
        write = writing(self.model, self.tokenizer, self.ranks, self.layout)
        tensors = {n: x for n, x in self.optimizers.whole_tensors() if self.ranks.first}
        put = partial(checkpoints.put, self.folder, self.counters.step, write, tensors, state)
        try:
            self.path = Path(self.ranks.lead(lambda: str(put())))
        except SaveError as error:
            self.counters.best, self.unsaved = before, error
            self.report.warned(f"{error}. The training goes on")
            return
        self.unsaved = None
        if self.ranks.first:
            checkpoints.prune(self.folder, self.config.checkpoint.keep)
        self.report.saved(Saved(step=self.counters.step, path=self.path, best=is_best))

    def _dtype(self) -> str:
        """Return the dtype that weights are saved in."""
        low = self.config.optimizer.precision == "bfloat16"
        return str(torch.bfloat16 if low else self.model.dtype)

    def _take_over(self, start: SavedCheckpoint, resume: Resume) -> None:
        """Go on from a checkpoint whose model is there already."""
        state = start.state
        check_format(start)
        now = {"data": self.data.fingerprint(), "dtype": self._dtype()}
        for line in check_same(start, now, resume):
            self.report.warned(line)
        for line in moved(state["surroundings"], surroundings(self.ranks.axes)):
            self.report.warned(line)
        self.optimizers.load(checkpoints.read_tensors(start))
        self.counters = Counters.of(state["counters"])
        drawn = [state["random"], *state.get("others", ())]
        if self.ranks.rank < len(drawn):
            Randomness(drawn[self.ranks.rank]).restore()
        self.path = start.path

    # -- telling -----------------------------------------------------------------------------

    def _beginning(self) -> Beginning:
        train = self.config.train
        _, parts = self._read(self._progress())
        tensors = self.optimizers.tensors().values()
        return Beginning(
            folder=self.folder,
            model=self.model,
            step=self.counters.step,
            steps=train.steps,
            tokens=train.tokens,
            minutes=train.minutes,
            step_tokens=self._tokens(parts),
            parts=len(parts),
            context=self.data.context,
            documents=self.data.documents,
            data_tokens=self.data.tokens,
            optimizer_bytes=sum(tensor.nbytes for tensor in tensors),
            settings=plain(self.config),
        )

    def _result(self) -> TrainingResult:
        assert self.path is not None
        found = checkpoints.best(checkpoints.saved_checkpoints(self.folder))
        return TrainingResult(
            model=self.model.eval(),
            tokenizer=self.tokenizer,
            folder=self.folder,
            path=self.path,
            best=None if found is None else found.path,
            step=self.counters.step,
            tokens=self.counters.tokens,
            seconds=self.counters.seconds,
            loss=self.loss,
            evaluation=self.evaluation,
        )

    def close(self) -> None:
        """Remove the training's additions from the model."""
        if self.loads is not None:
            self.loads.close()
        if self.dropping is not None:
            self.dropping.close()
        self.optimizers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
