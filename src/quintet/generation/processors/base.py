"""Base classes of logits processors: maps from (ids, scores) to scores."""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quintet.configuration.numbers import is_finite
from quintet.errors import InputError, shown

TokenIds = int | Iterable[int] | Tensor


class LogitsProcessor:
    """Maps ids (B, T) and scores (B, V) to scores (B, V); -inf forbids a token.

    What is given is not changed. One that looks at the ids may take further arguments: `padding`,
    (B,) the number of leading columns of each row that are no text, or None; `unfinished`, (B,)
    False for rows whose scores are not needed, or None.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(ids, scores)")

    def reorder(self, rows: Tensor) -> None:
        """Reorder the state per row (B,) for beam search."""


class ConstrainingProcessor(LogitsProcessor):
    """Forbids tokens, and knows which before there are scores.

    So what is drafted can be cut to what may come, and what has to come be drafted.
    """

    def accepted(self, row: int, ids: Tensor, tokens: list[int]) -> int:
        """Return the number of the given tokens that may follow a row's ids (T,)."""
        raise NotImplementedError(f"{type(self).__name__} has to define accepted(row, ids, tokens)")

    def forced(self, row: int, ids: Tensor) -> list[int]:
        """Return the tokens that must follow a row's ids (T,)."""
        raise NotImplementedError(f"{type(self).__name__} has to define forced(row, ids)")


class LogitsWarper(LogitsProcessor):
    """Reshapes a distribution without looking at text or token identity.

    A token at -inf is as good as not there. So a warper may be given part of a vocabulary, or
    many positions at once; a subclass that defines `__call__` is not, for it may look at the ids.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.warp(scores)

    def warp(self, scores: Tensor) -> Tensor:
        """Return new scores (B, n) for any n tokens."""
        raise NotImplementedError(f"{type(self).__name__} has to define warp(scores)")


class LogitsProcessorList(list[Any]):
    """A list of processors, applied in order."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Apply all; each gets the further arguments that it names.

        Raises:
            InputError: a processor needs an argument that is not given.
        """
        for processor in self:
            further = {}
            kind: Any = type(processor)
            for name, needed in _further(kind).items():
                if name in kwargs:
                    further[name] = kwargs[name]
                # Once the name of `unfinished`: one that has a default would never be given.
                elif needed or name == "goes_on":
                    raise InputError(
                        f"{type(processor).__name__} needs the argument {shown(name)}; a logits "
                        "processor is called with (input_ids, scores), and with padding=… and "
                        "unfinished=… if it names those"
                    )
            scores = processor(input_ids, scores, **further)
        return scores

    def takes_argument(self, name: str) -> bool:
        """Return whether a processor names an argument after ids and scores."""
        kinds: list[Any] = [type(processor) for processor in self]
        return any(name in _further(kind) for kind in kinds)


@functools.cache
def _further(kind: Any) -> dict[str, bool]:
    """Return the arguments after ids and scores, and whether each is required."""
    call = inspect.signature(kind.__call__).parameters
    named = [p for p in call.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default is p.empty for p in named[3:]}


def row_lengths(input_ids: Tensor, padding: Tensor | None) -> int | Tensor:
    """Return the number of tokens per row: one number, or (B,)."""
    return input_ids.shape[1] if padding is None else input_ids.shape[1] - padding


def token_ids(name: str, value: TokenIds) -> Tensor:
    """Return ids as a tensor (N,).

    Raises:
        InputError: they are not integers of at least 0.
    """
    rule = f"{name}={shown(value)} has to be token ids, integers of at least 0"
    try:
        given = [value] if isinstance(value, int) else value
        # Their own dtype says whether they are ids.
        found = (
            given
            if isinstance(given, Tensor)
            else torch.tensor(list(given), dtype=None, device="cpu")
        )
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(rule) from None
    if found.numel() == 0:
        return found.reshape(-1).long()
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or bool((found < 0).any()):
        raise InputError(rule)
    return found.reshape(-1).long()


def largest(ids: Tensor) -> int:
    """Return the largest of some ids, to check against a vocabulary."""
    return int(ids.max()) if ids.numel() else 0


def check_known(name: str, token: int, V: int) -> None:
    """Check that the vocabulary has an option's largest token.

    Raises:
        InputError: it has not.
    """
    if token >= V:
        raise InputError(
            f"{name} names token {token}, which is outside of the vocabulary, 0 to {V - 1}"
        )


def forbid(scores: Tensor, ids: Tensor, rows: bool | Tensor = True) -> Tensor:
    """Set the tokens `ids` (N,) to -inf, in all rows, none, or those of (B,)."""
    if rows is False:
        return scores
    ids = ids.to(scores.device)
    without = scores.index_fill(1, ids[ids < scores.shape[1]], -torch.inf)
    return without if rows is True else torch.where(rows[:, None], without, scores)


def positive_float(name: str, value: float) -> float:
    """Check that a number is positive, and return it as a float."""
    if not is_finite(value) or value <= 0:
        raise InputError(f"{name}={shown(value)} has to be a finite number greater than 0")
    return float(value)


def finite_float(name: str, value: float) -> float:
    """Check that a number is finite, and return it as a float."""
    if not is_finite(value):
        raise InputError(f"{name}={shown(value)} has to be a finite number")
    return float(value)
