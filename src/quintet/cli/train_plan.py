"""`quintet train --dry-run`: all read, nothing trained; what would happen, and its memory."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quintet.errors import DoesNotFitError

if TYPE_CHECKING:
    from quintet.training.config import TrainingConfig


def show_plan(settings: "TrainingConfig") -> None:
    """Describe a training without running it; the texts it reads stay encoded for the training.

    Raises:
        DoesNotFitError: the machine has less memory.
        QuintetError: what would keep the training from beginning.
    """
    from quintet.cli.output import size_of
    from quintet.cli.train_banner import banner, needed
    from quintet.measurement.machine import Machine
    from quintet.training.planning import planned

    beginning = planned(settings, tell=lambda line: click.echo(line, err=True))
    for line in banner(beginning, settings):
        click.echo(line)
    needs, room = needed(beginning, settings).total, Machine.here().memory
    if room is not None and needs > room:
        raise DoesNotFitError(
            f"the training needs about {size_of(needs)}, and this machine has {size_of(room)}; "
            "cut steps into more parts ([train] parts), let layers be recomputed "
            "([train] recompute = true), or train an [adapter]"
        )
    click.echo(f"nothing was trained; {Path(settings.train.folder)} is as it was")
