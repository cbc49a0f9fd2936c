"""Weights of losses, as numbers or as schedules along a training."""

from quintet.configuration.numbers import is_finite
from quintet.errors import InputError, shown
from quintet.training.schedule import Schedule
from quintet.training.schedules import schedule_of


def weight_schedule(name: str, weight: Schedule | float) -> Schedule:
    """Return a weight as a schedule.

    Raises:
        InputError: it is a number below 0, or none.
    """
    if isinstance(weight, int | float) and not (is_finite(weight) and weight >= 0):
        raise InputError(f"{name}={shown(weight)} weighs a loss; it is at least 0")
    return schedule_of(weight)
