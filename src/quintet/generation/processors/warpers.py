"""Warpers of a distribution: temperature, truncation, normalisation.

`beside` makes one of several: it reshapes each row by a number of its own, just as alone.
"""

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation.processors.base import LogitsProcessor, LogitsWarper, positive_float
from quintet.ops import sampling


class TemperatureLogitsWarper(LogitsWarper):
    """Divides scores by a temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = positive_float("temperature", temperature)

    def warp(self, scores: Tensor) -> Tensor:
        return scores / sampling.alongside(self.temperature, scores)


class _Cut(LogitsWarper):
    """Sets tokens to `filter_value`, keeping the `min_tokens_to_keep` most likely."""

    def __init__(self, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        if not isinstance(min_tokens_to_keep, int) or min_tokens_to_keep < 1:
            raise InputError(f"min_tokens_to_keep={shown(min_tokens_to_keep)} has to be at least 1")
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def _cut(self, scores: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        return scores.masked_fill(~keep(scores), self.filter_value)


class TopKLogitsWarper(_Cut):
    """Keeps the `top_k` most likely tokens, and ties with the last of them."""

    def __init__(
        self, top_k: int, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise InputError(f"top_k={shown(top_k)} has to be an integer of at least 1")
        self.top_k: int | Tensor = max(top_k, min_tokens_to_keep)
        # The largest, where rows have their own and are not on the CPU.
        self._most: int | None = None

    def warp(self, scores: Tensor) -> Tensor:
        return self._cut(scores, lambda x: sampling.in_top_k(x, self.top_k, self._most))


class TopPLogitsWarper(_Cut):
    """Keeps the fewest most likely tokens with total probability p (arXiv:1904.09751)."""

    def __init__(
        self, top_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = _share("top_p", top_p)

    def warp(self, scores: Tensor) -> Tensor:
        least = self.min_tokens_to_keep
        return self._cut(scores, lambda x: sampling.in_top_p(x, self.top_p, least))


class MinPLogitsWarper(_Cut):
    """Keeps tokens at least `min_p` times as likely as the top one (arXiv:2407.01082)."""

    def __init__(
        self, min_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = _share("min_p", min_p)

    def warp(self, scores: Tensor) -> Tensor:
        least = self.min_tokens_to_keep
        return self._cut(scores, lambda x: sampling.above_min_p(x, self.min_p, least))


class TypicalLogitsWarper(_Cut):
    """Keeps tokens whose information is nearest to the entropy (arXiv:2202.00666)."""

    def __init__(
        self, mass: float = 0.9, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = _inside("typical_p", mass)

    def warp(self, scores: Tensor) -> Tensor:
        least = self.min_tokens_to_keep
        return self._cut(scores, lambda x: sampling.typical(x, self.mass, least))


class EpsilonLogitsWarper(_Cut):
    """Keeps tokens of probability at least epsilon (arXiv:2210.15191)."""

    def __init__(
        self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _inside("epsilon_cutoff", epsilon)

    def warp(self, scores: Tensor) -> Tensor:
        least = self.min_tokens_to_keep
        return self._cut(scores, lambda x: sampling.above_epsilon(x, self.epsilon, least))


class EtaLogitsWarper(_Cut):
    """Keeps tokens above min(ε, √ε·exp(-entropy)) (arXiv:2210.15191)."""

    def __init__(
        self,
        epsilon: float,
        filter_value: float = -math.inf,
        min_tokens_to_keep: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _inside("eta_cutoff", epsilon)

    def warp(self, scores: Tensor) -> Tensor:
        least = self.min_tokens_to_keep
        return self._cut(scores, lambda x: sampling.above_eta(x, self.epsilon, least))


class TopHLogitsWarper(_Cut):
    """Keeps the most likely tokens with a share of the entropy (arXiv:2509.02510).

    Attributes:
        top_n: how many of the likeliest tokens the entropy is taken over.
    """

    top_n = 100

    def __init__(self, top_h: float, filter_value: float = -math.inf) -> None:
        super().__init__(filter_value)
        self.top_h = _share("top_h", top_h)
        if self.top_h == 0:
            raise InputError("top_h=0 has to be greater than 0 and at most 1")

    def warp(self, scores: Tensor) -> Tensor:
        return self._cut(scores, lambda x: sampling.in_top_h(x, self.top_h, self.top_n))


class LogitNormalization(LogitsWarper):
    """Turns scores into log-probabilities."""

    def warp(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=-1)


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replaces NaN by 0 and infinities by the largest finite numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.nan_to_num(scores, nan=0.0)


# The number of each class that rows may have for themselves; none of what has none.
_NUMBERS: dict[type[LogitsWarper], str | None] = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
    TypicalLogitsWarper: "mass",
    EpsilonLogitsWarper: "epsilon",
    EtaLogitsWarper: "epsilon",
    TopHLogitsWarper: "top_h",
    LogitNormalization: None,
}


_IN_ONE_PASS = [
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
]


def kind(warper: LogitsWarper) -> Hashable:
    """Return a key that is equal for warpers that `beside` can join."""
    if type(warper) not in _NUMBERS:
        return id(warper)
    number = _NUMBERS[type(warper)]
    return type(warper), *((k, v) for k, v in vars(warper).items() if k != number)


def stack(warpers: Sequence[LogitsWarper]) -> LogitsWarper:
    """Join warpers of one kind, a row each, into one with values per row."""
    first = warpers[0]
    number = _NUMBERS.get(type(first))
    if number is None:
        return first
    values = [vars(warper)[number] for warper in warpers]
    if all(value == values[0] for value in values):
        return first
    copied = copy.copy(first)
    dtype = torch.long if isinstance(values[0], int) else torch.float64
    vars(copied)[number] = torch.tensor(values, dtype=dtype, device="cpu")[:, None]
    return copied


def of_rows(warper: LogitsWarper, rows: Tensor) -> LogitsWarper:
    """Return a warper for the rows named by an index."""
    number = _NUMBERS.get(type(warper))
    if number is None or not isinstance(vars(warper)[number], Tensor):
        return warper
    copied = copy.copy(warper)
    vars(copied)[number] = vars(warper)[number][rows.cpu()]
    return copied


class Cuts(TypedDict):
    """The warping of a one-pass draw, in this order; None for nothing."""

    temperature: sampling.Value | None
    top_k: int | Tensor | None
    top_p: sampling.Value | None
    min_p: sampling.Value | None


def cuts(warpers: Sequence[LogitsWarper]) -> Cuts | None:
    """Return the combined cuts of warpers, if only these four occur, once and in order."""
    found = Cuts(temperature=None, top_k=None, top_p=None, min_p=None)
    last = -1
    for warper in warpers:
        if type(warper) not in _IN_ONE_PASS:
            return None
        place = _IN_ONE_PASS.index(type(warper))
        if place <= last:
            return None
        last = place
        if isinstance(warper, _Cut) and warper.filter_value != -math.inf:
            return None
        if isinstance(warper, TemperatureLogitsWarper):
            found["temperature"] = warper.temperature
        elif isinstance(warper, TopKLogitsWarper):
            found["top_k"] = warper.top_k
        elif isinstance(warper, _Cut) and warper.min_tokens_to_keep > 1:
            return None
        elif isinstance(warper, TopPLogitsWarper):
            found["top_p"] = warper.top_p
        elif isinstance(warper, MinPLogitsWarper):
            found["min_p"] = warper.min_p
    return found


def on(warper: LogitsWarper, device: torch.device) -> LogitsWarper:
    """Move a warper's values per row to a device."""
    number = _NUMBERS.get(type(warper))
    values = None if number is None else vars(warper)[number]
    if not isinstance(values, Tensor) or values.device == device:
        return warper
    copied = copy.copy(warper)
    vars(copied)[cast("str", number)] = values.to(device, non_blocking=True)
    if isinstance(copied, TopKLogitsWarper):
        copied._most = int(values.max())
    return copied


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name}={shown(value)} has to be a number from 0 to 1")
    return float(value)


def _inside(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"{name}={shown(value)} has to be a number between 0 and 1, both excluded")
    return float(value)
