"""`quintet train`: a training as a file in TOML says, and what has been trained as a plot."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from quintet.cli.dispatching import DispatchingCommand
from quintet.cli.options import warnings_as_notes
from quintet.cli.terminal import note
from quintet.errors import MissingDependencyError

if TYPE_CHECKING:
    from quintet.training.config import TrainingConfig

EXAMPLES = ("pretrain", "continue", "sft", "dpo")


class _Train(DispatchingCommand):
    """One command, and a second one that plots runs, with other options."""

    others = MappingProxyType({"plot": "train_plot"})


@click.command("train", cls=_Train)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, to the same bits.")
@click.option(
    "--resume-changed", is_flag=True, help="Go on though settings or data are others than before."
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="In place of what the file says; may be given again.",
)
@click.option("--dry-run", is_flag=True, help="Read everything, and say what would happen.")
@click.option("--plot", is_flag=True, help="Plot the run at its end: here, and into plot.png.")
@click.option(
    "--example",
    type=click.Choice(EXAMPLES),
    help="Print a file to begin with, and end.",
)
@click.option("--quiet", "-q", is_flag=True, help="Nothing but the result.")
def command(
    config: Path | None,
    resume: bool,
    resume_changed: bool,
    changes: tuple[str, ...],
    dry_run: bool,
    plot: bool,
    example: str | None,
    quiet: bool,
) -> None:
    """Train a model as CONFIG says, a file in TOML: pre-training, SFT, DPO, adapters.

    To begin:  quintet train --example sft > sft.toml, change what it names, quintet train sft.toml.
    The run is in its folder afterwards: checkpoints that load as models, config.toml,
    metrics.jsonl. Ctrl-C saves and ends; --resume goes on. docs/guides/training.md has all keys.

    torchrun --nproc-per-node 2 -m quintet train CONFIG trains in two processes.

    `quintet train plot RUN...` draws runs beside each other.
    """
    if example is not None:
        click.echo(_example(example), nl=False)
        return
    if config is None:
        raise click.UsageError(
            "Name a file in TOML. One to begin with: quintet train --example pretrain > train.toml"
        )
    if plot:
        _have("matplotlib", "plotext")
    from quintet.training.config import TrainingConfig
    from quintet.training.settings import read

    with warnings_as_notes(quiet or is_silent()):
        settings = read(TrainingConfig, config, changes)
        if dry_run:
            from quintet.cli.train_plan import show_plan

            if not is_silent():
                show_plan(settings)
            return
        folder = _run(settings, config, changes, resume, resume_changed, quiet)
    if plot and not is_silent():
        from quintet.cli.train_plot import draw

        draw((folder,), None, "tokens")


def _run(
    settings: "TrainingConfig",
    config: Path,
    changes: tuple[str, ...],
    resume: bool,
    resume_changed: bool,
    quiet: bool,
) -> Path:
    """Train, print where the result is, and return the run's folder."""
    from quintet.cli.compiling import have_kernels
    from quintet.cli.train_report import Console
    from quintet.training.loop import train

    # Of several processes one talks.
    quiet = quiet or is_silent()
    have_kernels(quiet)
    settings = with_peak(settings)
    console = Console(settings, quiet)
    try:
        result = train(settings, resume="changed" if resume_changed else resume, report=console)
    except KeyboardInterrupt:
        if console.path is not None:
            set_again = "".join(f" --set {change}" for change in changes)
            note(f"saved {console.path}; go on: quintet train {config}{set_again} --resume")
        raise
    if is_silent():
        return result.folder
    best = "" if result.best in (None, result.path) else f"; the best: {result.best}"
    note(f"try it: quintet generate -m {result.path} PROMPT{best}", quiet)
    click.echo(result.path)
    return result.folder


def is_silent() -> bool:
    """Return whether another of several processes is the one that talks."""
    return os.environ.get("RANK", "0") != "0"


def with_peak(settings: "TrainingConfig") -> "TrainingConfig":
    """Return settings with the machine's peak: as given, or as measured."""
    import torch

    from quintet.measurement.machine import gemm_peak
    from quintet.parallel.world import environment_size

    if settings.report.peak_flops is not None:
        return settings
    threads = torch.get_num_threads()
    wide = settings.optimizer.precision == "float32" and settings.model.dtype != "bfloat16"
    try:
        torch.set_num_threads(settings.train.threads or threads)
        peak = gemm_peak(torch.float32 if wide else torch.bfloat16, 0.1) * environment_size()
    finally:
        torch.set_num_threads(threads)
    return replace(settings, report=replace(settings.report, peak_flops=peak))


def _example(name: str) -> str:
    path = Path(__file__).parents[1] / "training" / "recipes" / f"{name}.toml"
    return path.read_text(encoding="utf-8")


def _have(*packages: str) -> None:
    """Check that packages are there before hours are spent.

    Raises:
        MissingDependencyError: one is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"--plot needs {', '.join(missing)}; install it: pip install 'quintet[train]'"
        )
