"""Curves of runs: which there are, as a picture and as characters."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from quintet.errors import InputError, MissingDependencyError
from quintet.training.curves import panels, runs
from quintet.training.plots import plot_png, plot_text


def written(folder: Path, steps: int = 120, **more: Any) -> Path:
    """A run of so many steps that has looked twice."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0}]
    for step in range(1, steps + 1):
        told = {
            **{"event": "step", "step": step, "tokens": 10 * step, "elapsed": 30.0 * step},
            **{"loss": 1 + 1 / step, "tokens_per_second": 100.0, "grad_norm": 1.0},
            **{"terms": {"next_token": 1 / step}, "learning_rates": {"a": 0.1, "b": 0.1}},
            **{"balance": {"model.layers.1.mlp.gate": 0.5, "model.layers.2.mlp.gate": 1.5}},
            "skipped": "its loss is not finite" if step == 7 else None,
        }
        lines.append({**told, **more})
        if step % 60 == 0:
            bits = {"bits_per_byte": 2.0, "bits_per_token": 3.0, "agreement": None}
            lines.append({"event": "evaluation", "step": step, "tokens": 10 * step, **bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_alone_shows_its_layers(tmp_path: Path) -> None:
    found = {panel.title: panel.curves for panel in panels(runs([written(tmp_path / "run")]))}
    assert [*found] == [
        "loss",
        "held out, bits per byte",
        "MaxVio, max load / mean load - 1",
        "learning rate",
        "tokens per second",
        "gradient norm",
    ]
    loss = found["loss"][0]
    # Steps that were left out are not among them.
    assert len(loss.x) == 119
    assert loss.rough == [1 / step for step in range(1, 121) if step != 7]
    # A mean of all points so far that forgets half of a fiftieth of them lags little.
    assert loss.rough[-1] < loss.y[-1] < loss.rough[-6]
    assert [curve.name for curve in found["MaxVio, max load / mean load - 1"]] == [
        "layer 1",
        "layer 2",
    ]
    # Groups that move alike are one curve.
    assert [curve.name for curve in found["learning rate"]] == ["run"]


def test_several_runs_are_beside_each_other(tmp_path: Path) -> None:
    folders = [
        written(tmp_path / "one"),
        written(tmp_path / "two", learning_rates={"a": 0.1, "b": 0.2}),
    ]
    found = {panel.title: panel.curves for panel in panels(runs(folders))}
    assert [curve.name for curve in found["loss"]] == ["one", "two"]
    means = found["MaxVio, max load / mean load - 1"]
    assert [(curve.run, curve.y[-1]) for curve in means] == [(0, 1.0), (1, 1.0)]
    assert [curve.name for curve in found["learning rate"]] == ["one", "two a", "two b"]


def test_evaluations_are_where_their_steps_are(tmp_path: Path) -> None:
    told = runs([written(tmp_path / "run")])
    for axis, last in (("tokens", 1200), ("steps", 120), ("minutes", 60)):
        held = next(p for p in panels(told, axis) if p.title.startswith("held out"))  # type: ignore[arg-type]
        assert held.curves[0].x == [last / 2, last]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [written(tmp_path / "a" / "run"), written(tmp_path / "b" / "run")]
    assert [*runs(folders)] == [str(folder) for folder in folders]
    assert [*runs([folders[0] / "metrics.jsonl"])] == ["run"]


def test_a_picture_and_characters(tmp_path: Path) -> None:
    folders = [written(tmp_path / "one"), written(tmp_path / "two")]
    plot_png(folders, tmp_path / "deep" / "plot.png", "steps")
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")
    said = plot_text(folders, width=60, colours=False)
    assert all(len(line) <= 60 for line in said.splitlines())
    assert "held out, bits per byte" in said
    assert "one" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(("library", "plot"), [("matplotlib", plot_png), ("plotext", plot_text)])
def test_a_missing_library_is_named(
    library: str, plot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def imported(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", imported)
    rest = (tmp_path / "plot.png",) if plot is plot_png else ()
    with pytest.raises(MissingDependencyError, match=r"pip install 'quintet\[train\]'"):
        plot([written(tmp_path / "run")], *rest)


def test_a_run_without_steps_has_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to plot"):
        plot_text([written(tmp_path / "run", steps=0)])
