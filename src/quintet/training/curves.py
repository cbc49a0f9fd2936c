"""Curves out of a run's metrics: what there is to plot, without anything that plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quintet.configuration.numbers import is_finite
from quintet.training.metrics import read_metrics

Axis = Literal["tokens", "steps", "minutes"]
AXES: Mapping[Axis, str] = {"tokens": "tokens", "steps": "step", "minutes": "elapsed"}


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one run, or of one part of it.

    Attributes:
        run: the number of its run.
        name: what tells it from others of its panel.
        x: (N,) how far the training was.
        y: (N,) what was measured.
        rough: (N,) the same, before it was smoothed; None if it was not.
    """

    run: int
    name: str
    x: list[float]
    y: list[float]
    rough: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share an axis."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    logarithmic: bool = False


def runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Read the metrics of runs, each under the shortest name that is unique.

    Raises:
        ModelNotFoundError: a folder has no metrics.
        CheckpointError: a line is none of them.
    """
    metrics: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        path = (folder if folder.is_dir() else folder.parent).resolve()
        known = [(f if f.is_dir() else f.parent).resolve().name for f in folders]
        name = path.name if known.count(path.name) == 1 else str(folder)
        metrics[name] = read_metrics(folder)
    return metrics


def panels(metrics: Mapping[str, list[dict[str, Any]]], axis: Axis = "tokens") -> list[Panel]:
    """Return the panels of runs that have something to show, loss first."""
    found: dict[str, Panel] = {}

    def add(title: str, curve: Curve, logarithmic: bool = False) -> None:
        if curve.x:
            found.setdefault(title, Panel(title, [], logarithmic)).curves.append(curve)

    for number, (name, lines) in enumerate(metrics.items()):
        steps = [line for line in lines if line["event"] == "step" and not line.get("skipped")]
        looks = [line for line in lines if line["event"] == "evaluation"]
        places = _places(steps, axis)
        _add_loss(add, number, name, steps, axis)
        unit = "byte" if any(look.get("bits_per_byte") is not None for look in looks) else "token"
        add(
            f"held out, bits per {unit}",
            _curve(number, name, looks, axis, f"bits_per_{unit}", places),
        )
        _add_balance(add, number, name, steps, axis, alone=len(metrics) == 1)
        for label, curve in _rates(number, name, steps, axis).items():
            add("learning rate", Curve(number, label, curve.x, curve.y))
        add("tokens per second", _smooth(_curve(number, name, steps, axis, "tokens_per_second")))
        add("gradient norm", _smooth(_curve(number, name, steps, axis, "grad_norm")), True)
        share = _curve(number, name, looks, axis, "agreement", places)
        add("prediction layer agrees", share)
    return list(found.values())


def _add_loss(add: Any, number: int, name: str, steps: list[Any], axis: Axis) -> None:
    """Add the loss of the next token where it is told apart, else the whole, and other terms."""
    terms = _keys(steps, "terms")
    main: Any = ("terms", "next_token") if "next_token" in terms else "loss"
    add("loss", _smooth(_curve(number, name, steps, axis, main)))
    for term in terms:
        if term != "next_token":
            add(term.replace("_", " "), _smooth(_curve(number, name, steps, axis, ("terms", term))))


def _add_balance(
    add: Any, number: int, name: str, steps: list[Any], axis: Axis, *, alone: bool
) -> None:
    """Add MaxVio: of a run that is alone by its layers, of several runs the mean."""
    title = "MaxVio, max load / mean load - 1"
    routers = _keys(steps, "balance")
    if alone:
        for router in routers:
            add(title, _smooth(_curve(number, _layer(router), steps, axis, ("balance", router))))
        return
    means = [
        {**step, "mean": sum(loads) / len(loads)}
        for step in steps
        if (loads := [load for load in (step.get("balance") or {}).values() if load is not None])
    ]
    add(title, _smooth(_curve(number, name, means, axis, "mean")))


def _rates(number: int, name: str, steps: list[Any], axis: Axis) -> dict[str, Curve]:
    """Return the learning rates that differ, under their groups' names where they do."""
    different: dict[tuple[float, ...], Curve] = {}
    for group in _keys(steps, "learning_rates"):
        curve = _curve(number, group, steps, axis, ("learning_rates", group))
        different.setdefault(tuple(curve.y), curve)
    if len(different) == 1:
        return {name: next(iter(different.values()))}
    return {f"{name} {curve.name}": curve for curve in different.values()}


def _layer(router: str) -> str:
    """Return the number of a router's layer, which identifies it."""
    numbers = [part for part in router.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else router


def _keys(steps: list[Any], table: str) -> list[str]:
    return list(dict.fromkeys(key for step in steps for key in step.get(table) or ()))


def _places(steps: list[Any], axis: Axis) -> dict[int, float]:
    """Return how far the training was at each step."""
    return {step["step"]: _place(step, axis) for step in steps}


def _place(line: Mapping[str, Any], axis: Axis) -> float:
    value = float(line.get(AXES[axis]) or 0)
    return value / 60 if axis == "minutes" else value


def _curve(
    number: int,
    name: str,
    lines: list[Any],
    axis: Axis,
    key: str | tuple[str, str],
    places: Mapping[int, float] | None = None,
) -> Curve:
    """Return the finite values of a key; `places` has the steps of evaluations."""
    x, y = [], []
    for line in lines:
        value = line.get(key) if isinstance(key, str) else (line.get(key[0]) or {}).get(key[1])
        if is_finite(value):
            known = None if places is None else places.get(line["step"])
            x.append(_place(line, axis) if known is None else known)
            y.append(float(value))
    return Curve(number, name, x, y)


def _smooth(curve: Curve) -> Curve:
    """Return a curve whose points are means of those up to them, the last fiftieth above all."""
    keep = 1 - 1 / max(1.0, len(curve.y) / 50)
    total = weight = 0.0
    smooth = []
    for value in curve.y:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return Curve(curve.run, curve.name, curve.x, smooth, curve.y if keep else None)
