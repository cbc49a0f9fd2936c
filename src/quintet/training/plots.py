"""Curves of runs as a picture, and as characters of a terminal."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quintet.errors import InputError, MissingDependencyError
from quintet.files import write_bytes
from quintet.training.curves import Axis, Panel, panels, runs

# What a terminal is shown of the panels: it is read from above to below.
MAIN = ("loss", "reward", "held out", "MaxVio", "learning rate")
UNITS = {1e9: "10^9 ", 1e6: "10^6 "}
# More curves than that cannot be told apart by characters.
MOST = 6
NOTHING = "these runs have told of no step yet; there is nothing to plot"


def plot_png(folders: Sequence[Path], path: Path, axis: Axis = "tokens") -> None:
    """Write a picture of runs beside each other, whole or not at all.

    Args:
        folders: of the runs.
        path: of the picture, in PNG.
        axis: what is to the right: tokens, steps, or minutes of the steps.

    Raises:
        MissingDependencyError: matplotlib is not there.
        InputError: there is nothing to plot.
        ModelNotFoundError: a folder has no metrics.
        SaveError: it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a plot needs matplotlib; install it with pip install 'quintet[train]'"
        ) from error
    metrics = runs(folders)
    found = panels(metrics, axis)
    if not found:
        raise InputError(NOTHING)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, found, strict=False):
        # One run has its colours by what it tells, several each their own.
        by_run = len(metrics) > 1
        for number, curve in enumerate(panel.curves):
            colour = f"C{(curve.run if by_run else number) % 10}"
            marker = "o" if len(curve.x) < 30 else None
            if curve.rough is not None:
                axes.plot(curve.x, curve.rough, color=colour, alpha=0.2, linewidth=0.7)
            axes.plot(curve.x, curve.y, color=colour, label=curve.name, marker=marker, ms=3)
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(axis, fontsize=9)
        axes.grid(alpha=0.3)
        if len(panel.curves) > 1 or by_run:
            axes.legend(fontsize=7)
    if len(metrics) == 1:
        figure.suptitle(next(iter(metrics)), fontsize=11)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    write_bytes(path, written.getvalue())


def plot_text(
    folders: Sequence[Path], axis: Axis = "tokens", width: int = 80, colours: bool = True
) -> str:
    """Return the same for a terminal, a panel below the other.

    Args:
        folders: of the runs.
        axis: what is to the right.
        width: how many characters are in a line.
        colours: whether the terminal has some.

    Raises:
        MissingDependencyError: plotext is not there.
        InputError: there is nothing to plot.
        ModelNotFoundError: a folder has no metrics.
    """
    try:
        import plotext
    except ImportError as error:
        raise MissingDependencyError(
            "a plot in the terminal needs plotext; install it with pip install 'quintet[train]'"
        ) from error
    found = [panel for panel in panels(runs(folders), axis) if panel.title.startswith(MAIN)]
    if not found:
        raise InputError(NOTHING)
    # The picture may be higher than the terminal, which can be scrolled.
    plotext.terminal.limit(False, False)
    return "\n".join(_drawn(plotext.figure, panel, axis, width, colours) for panel in found)


def _drawn(figure: Any, panel: Panel, axis: Axis, width: int, colours: bool) -> str:
    figure.clear()
    figure.plot_size(width, 15)
    shown = panel.curves[:MOST]
    last = max(curve.x[-1] for curve in shown)
    unit = next((size for size in UNITS if last >= size), 1.0)
    for curve in shown:
        stride = -(-len(curve.x) // (2 * width))
        x, y = [value / unit for value in curve.x[::stride]], curve.y[::stride]
        if panel.logarithmic:
            y = [math.log10(max(value, 1e-30)) for value in y]
        signal = figure.signal(x, y, marker="braille" if len(x) > 1 else "dot")
        signal.lines()
        if len(panel.curves) > 1:
            signal.label(curve.name)
        figure.draw(signal)
    # Most curves fall: their names are where they came from least.
    figure.legend(True, x=width - 10, ha="right")
    figure.title(f"log10 of {panel.title}" if panel.logarithmic else panel.title)
    figure.label(f"{UNITS.get(unit, '')}{axis}", "x")
    drawn: str = figure.build().string(colorless=not colours)
    return drawn.rstrip("\n")
