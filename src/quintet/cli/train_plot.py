"""`quintet train plot`: runs beside each other, in the terminal and as a picture."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quintet.cli.terminal import can_dim, note, width

if TYPE_CHECKING:
    from quintet.training.curves import Axis

# Wider ones are no clearer.
WIDEST = 110


@click.command("train plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The picture.  [default: plot.png in the first run's folder]",
)
@click.option(
    "--by",
    type=click.Choice(["tokens", "steps", "minutes"]),
    default="tokens",
    show_default=True,
    help="What is to the right.",
)
def command(runs: tuple[Path, ...], out: Path | None, by: "Axis") -> None:
    """Draw RUNS, folders that trainings wrote: loss, held-out bits, balance, learning rate, speed.

    Here, and as a picture. A run that is going on may be drawn, too.
    """
    draw(runs, out, by)


def draw(runs: tuple[Path, ...], out: Path | None, axis: "Axis") -> None:
    """Draw runs on standard output, and write the picture."""
    from quintet.training.plots import plot_png, plot_text

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    path = out or folder / "plot.png"
    columns = width(sys.stdout)
    colours = columns is not None and can_dim()
    click.echo(plot_text(runs, axis, min(columns or 80, WIDEST), colours))
    plot_png(runs, path, axis)
    note(f"written {path}")
