"""Training, from a configuration to its last checkpoint."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from quintet.errors import SaveError
from quintet.files import locked
from quintet.kernels.allocator import keep_freed_memory
from quintet.modeling.heads import CausalLMHead
from quintet.parallel.faults import collective
from quintet.tokenization import PreTrainedTokenizer
from quintet.training import checkpoints
from quintet.training.building import build_tokenizer, computed, prepared
from quintet.training.checkpoints import SavedCheckpoint, saved_checkpoints
from quintet.training.checks import check
from quintet.training.config import TrainingConfig, TrainSettings
from quintet.training.data import build_data
from quintet.training.joining import joined, local_part, parallelize, reference_loader
from quintet.training.metrics import Metrics
from quintet.training.ranks import Ranks
from quintet.training.records import Reporter, Reporters, Silent
from quintet.training.result import TrainingResult
from quintet.training.resuming import Resume, check_same, start_of
from quintet.training.run import Run
from quintet.training.settings import plain
from quintet.training.staged import check_staged, idle_stages
from quintet.training.state import Randomness


def train(
    config: TrainingConfig,
    *,
    model: CausalLMHead | None = None,
    tokenizer: PreTrainedTokenizer | None = None,
    resume: Resume = False,
    report: Reporter | None = None,
) -> TrainingResult:
    """Train a model by a configuration, or resume it.

    In the folder of the run are afterwards its settings, its metrics and its checkpoints
    (docs/guides/training.md). All randomness is as it was before.

    Several processes that torchrun started train together, as `[parallel]` says; the first of them
    tells and writes (docs/guides/parallel.md).

    Ctrl-C ends it after the step that runs, when that is saved: a KeyboardInterrupt follows, after
    SIGTERM SystemExit(143). A second signal ends it at once. In another thread than the main one
    signals are left alone.

    Args:
        config: everything that decides it.
        model: what is trained, in place of what `[model]` names.
        tokenizer: its tokenizer, in place of what `[tokenizer]` names.
        resume: go on from the last checkpoint in the folder, if there is one, to the same numbers;
            "changed" if settings or data may be others than they were.
        report: who is told of it, in the first process.

    Raises:
        ConfigError: settings break a rule, or do not go together with model or data.
        InputError: the folder holds a run already, or another one than is to go on.
        DivergedError: too many steps in a row were not finite.
        SaveError: another process trains here, or the last checkpoint could not be written.
        RankFailedError: another process failed, was ended, or did not come in time.
        QuintetError: model, tokenizer or data cannot be read.
    """
    folder = Path(config.train.folder)
    keep_freed_memory()
    with ExitStack() as stack:
        ranks = joined(config.parallel)
        check_staged(config, ranks.degrees)
        if ranks.size > 1:
            # Who waits in vain for another says which one failed.
            stack.enter_context(collective())
        reporter = report if report is not None and ranks.first else Silent()
        if (waits := idle_stages(config, ranks.degrees)) is not None:
            reporter.warned(waits)
        ranks.lead(lambda: stack.enter_context(_alone(folder)))
        stack.enter_context(_apart(config.train))
        if ranks.first:
            checkpoints.clean_up(folder)
        start = _start(ranks, folder, resume)
        if start is not None:
            # Before anything is read: what is wrong is told in terms of settings.
            for line in check_same(start, {"settings": plain(config)}, resume):
                reporter.warned(line)
        elif resume:
            reporter.warned(f"{folder} holds no checkpoint to go on from: the training begins anew")
        tokenizer = build_tokenizer(config) if tokenizer is None else tokenizer
        part = None if model is not None else local_part(config, ranks)
        model, objective = prepared(config, tokenizer, model, start, part, reference_loader(ranks))
        encode = partial(build_data, vocab_size=model.config.vocab_size, tell=reporter.warned)
        # Texts are encoded once; the others find them.
        data = ranks.in_turn(partial(encode, config.data, tokenizer))
        check(config, model, tokenizer, data, ranks.degrees)
        stack.enter_context(computed(model, config.train))
        layout = parallelize(model, config, ranks, part=part is not None)
        reporters = (
            Reporters(Metrics(config.report, reporter), reporter) if ranks.first else Silent()
        )
        run = Run(config, folder, model, tokenizer, objective, data, reporters, ranks, layout)
        return stack.enter_context(run).whole(start, resume)


def _start(ranks: Ranks, folder: Path, resume: Resume) -> SavedCheckpoint | None:
    """Return the checkpoint that all resume from, or None at a beginning."""

    def found() -> str | None:
        last = start_of(folder, resume)
        return None if last is None else last.path.name

    name = ranks.lead(found)
    # The first may have removed older ones meanwhile, but not this one.
    return (
        None if name is None else next(k for k in saved_checkpoints(folder) if k.path.name == name)
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, which is created if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise SaveError(f"the folder {folder} of the run cannot be made: {why}") from error
    with locked(folder, patience=0):
        yield


@contextmanager
def _apart(settings: TrainSettings) -> Iterator[None]:
    """Give the training randomness, threads, a default dtype and gradients of its own."""
    before, threads, dtype = Randomness.now(), torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        before.restore()
        torch.set_num_threads(threads)
