"""Refuses settings that sharded training does not support."""

from quintet.parallel.world import Degrees
from quintet.training.config import TrainingConfig
from quintet.training.settings import SettingError


def check_staged(config: TrainingConfig, degrees: Degrees) -> None:
    """Refuse settings that do not go together with `[parallel] pp`, or slices of tokens.

    Raises:
        SettingError: there is one; it names what does.
    """
    pp = degrees.pp
    if config.parallel.sequence_parallel and degrees.tp > 1:
        _check_slices(config, degrees)
    if pp == 1:
        return
    if degrees.ep > degrees.tp:
        raise SettingError(
            "parallel.ep",
            f" = {degrees.ep} sends tokens between processes whose stages are at other parts of a "
            f"step with pp = {pp}; take ep = tp = {degrees.tp}, or fewer",
        )
    if config.train.compile:
        raise SettingError.value(
            "train.compile",
            config.train.compile,
            f"is for layers that all are here, and with [parallel] pp = {pp} they are not; take "
            "one of the two out",
        )
    if config.balance.auxiliary is not None and config.balance.scope != "global":
        raise SettingError.value(
            "balance.scope",
            config.balance.scope,
            "counts the experts of all layers together while a part runs, and with [parallel] "
            f'pp = {pp} no process has all layers; take scope = "global", which counts before',
        )


def _check_slices(config: TrainingConfig, degrees: Degrees) -> None:
    """Refuse settings that do not go with `sequence_parallel`."""
    if degrees.cp > 1:
        raise SettingError(
            "parallel.sequence_parallel",
            f" = true divides the tokens of rows, as cp = {degrees.cp} does; take one of the two",
        )
    if degrees.ep > degrees.tp:
        raise SettingError(
            "parallel.sequence_parallel",
            f" = true leaves experts the tokens that tp = {degrees.tp} processes share, and "
            f"ep = {degrees.ep} sends tokens to others; take ep = tp, or fewer",
        )
    if degrees.pp > 1 and config.train.recompute:
        raise SettingError(
            "parallel.sequence_parallel",
            f" = true knows the tokens of the part that runs, and with pp = {degrees.pp} another "
            "part has run when [train] recompute runs layers again; take recompute out",
        )


def idle_stages(config: TrainingConfig, degrees: Degrees) -> str | None:
    """Warn if stages will wait for each other more than they need to."""
    pp, batches = degrees.pp, config.train.batches
    # A schedule may come to more later.
    if pp == 1 or not isinstance(batches, int | float):
        return None
    parts = config.train.parts * max(1, round(batches))
    if parts >= pp:
        return None
    return (
        f"[parallel] pp = {pp} stages work at once on {pp} parts of a step or more, and there are "
        f"{parts}: most of them wait; give [train] parts, best several times {pp}"
    )
