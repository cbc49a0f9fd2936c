"""Losses of a head in tiles that are never all in memory, and its logits on demand.

Most heads are a matrix that nobody put anything around, and then no more than a tile of logits is
ever there (`quintet.ops.linear_loss`), on each of several processes where these share it. A head in
fewer bits, or with adapters, is run over some tokens at a time, and again on the way back. A head
of which somebody wants to see each call, or whose rows have adapters of their own, is run over all
tokens at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quintet.adapters.lowrank import LowRank
from quintet.errors import InputError
from quintet.layers.adapted import AdaptedForward
from quintet.layers.linear import Linear
from quintet.layers.plain import called_only, hooked, untouched
from quintet.ops.labels import IGNORED, check_classes, readable
from quintet.ops.linear import linear
from quintet.ops.linear_loss import LogitSums, linear_sums, logit_sums
from quintet.ops.transforms import recorded, transformed
from quintet.parallel.regions import copied
from quintet.parallel.vocabulary import OtherIds, spread_ids
from quintet.quantization import QuantizedLinear

# How many logits a head makes at a time that is run as a module.
AT_ONCE = 1 << 25


class ScoredHead(ABC):
    """A head in the form that losses use, for one forward."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""

    @abstractmethod
    def sums(self, hidden: Tensor, labels: Tensor, *, mean: bool = False) -> LogitSums:
        """Return the losses' statistics of the logits, (...); 0 where the label is -100.

        Shapes: hidden (..., C), labels (...).

        Raises:
            InputError: a label is no id.
        """


class WholeHead(ScoredHead):
    """A head that computes all logits at once."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        return self.head(hidden)  # type: ignore[no-any-return]

    def sums(self, hidden: Tensor, labels: Tensor, *, mean: bool = False) -> LogitSums:
        """Compute the statistics for losses; see `ScoredHead.sums`."""
        logits = self.logits(hidden)
        check_classes(labels, logits.shape[-1])
        labels = labels.to(logits.device, torch.long)
        found = logit_sums(logits, labels.clamp(min=0), mean=mean)
        counts = labels != IGNORED
        return found.map(lambda x: torch.where(counts, x, 0.0))


class HeadInParts(ScoredHead):
    """A head whose logits are computed in tiles."""

    @property
    @abstractmethod
    def size(self) -> int:
        """V, the number of ids."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that the logits depend on."""

    @abstractmethod
    def sums_of(self, hidden: Tensor, ids: Tensor, mean: bool) -> LogitSums:
        """Compute the statistics for losses, from states (N, C) and ids (N,)."""

    def sums(self, hidden: Tensor, labels: Tensor, *, mean: bool = False) -> LogitSums:
        """Compute the statistics for losses; see `ScoredHead.sums`."""
        check_classes(labels, self.size)
        labels = labels.to(hidden.device, torch.long)
        rows, ids = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        counts = ids != IGNORED
        # To look for those that count would wait for a device, and leave holes in a program.
        masked = readable(ids) and not bool(counts.all())
        if masked:
            found = self.sums_of(rows[counts], ids[counts], mean)
        else:
            found = self.sums_of(rows, ids.clamp(min=0), mean)

        def placed(x: Tensor) -> Tensor:
            zeros = x.new_zeros(len(ids))
            every = zeros.masked_scatter(counts, x) if masked else torch.where(counts, x, zeros)
            return every.view(labels.shape)

        return found.map(placed)

    def later(self, hidden: Tensor) -> Callable[[], Tensor]:
        """Return a function that computes the logits (..., V) as they would be now.

        It raises an InputError where a tensor they are made of was changed meanwhile.
        """
        mode, before = _mode(hidden.device.type), self.tensors()
        versions = [_version(x) for x in (hidden, *before)]

        def make() -> Tensor:
            current = self.tensors()
            same = len(current) == len(before) and all(
                a is b for a, b in zip(current, before, strict=True)
            )
            if not same or [_version(x) for x in (hidden, *before)] != versions:
                raise InputError(
                    "the logits of a forward with labels are made when they are read, and the head "
                    "or the states were changed since then, as by a step of an optimiser; read "
                    "output.logits before that"
                )
            with mode():
                return self.logits(hidden)

        return make


class _Matrix(HeadInParts):
    def __init__(self, head: Linear) -> None:
        self.weight, self.bias = head.weight, head.bias

    @property
    def size(self) -> int:
        return len(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def sums_of(self, hidden: Tensor, ids: Tensor, mean: bool) -> LogitSums:
        return linear_sums(hidden, self.weight, ids, self.bias, mean=mean)


class _Spread(HeadInParts):
    """A head matrix whose rows are spread over processes."""

    def __init__(self, head: Linear, others: OtherIds) -> None:
        self.head, self.others = head, others

    @property
    def size(self) -> int:
        return self.others.size

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]

    def tensors(self) -> tuple[Tensor, ...]:
        head = self.head
        return (head.weight,) if head.bias is None else (head.weight, head.bias)

    def sums_of(self, hidden: Tensor, ids: Tensor, mean: bool) -> LogitSums:
        entered = copied(hidden, self.others.group)
        head = self.head
        return linear_sums(entered, head.weight, ids, head.bias, mean=mean, others=self.others)


class _Module(HeadInParts):
    def __init__(self, head: Linear | QuantizedLinear) -> None:
        self.head = head

    @property
    def size(self) -> int:
        return self.head.out_features

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.head.parameters(), *self.head.buffers())

    def sums_of(self, hidden: Tensor, ids: Tensor, mean: bool) -> LogitSums:
        before = self.tensors()

        def run(hidden: Tensor, ids: Tensor) -> tuple[Tensor | None, ...]:
            if any(a is not b for a, b in zip(self.tensors(), before, strict=True)):
                raise InputError(
                    "the head has other tensors on the way back than it had in the forward, as "
                    "outside of a torch.func.functional_call; run both inside of it"
                )
            return logit_sums(self.head(hidden), ids, mean=mean)

        n = max(1, AT_ONCE // self.size)
        parts = zip(torch.split(hidden, n), torch.split(ids, n), strict=True)
        done = [checkpoint(run, *part, use_reentrant=False) for part in parts]
        log_prob, log_sum, means = zip(*done, strict=True)
        return LogitSums(
            torch.cat(log_prob), torch.cat(log_sum), torch.cat(means) if mean else None
        )


def scored(head: nn.Module, *, by_rows: bool = False) -> ScoredHead:
    """Return a head in the form that losses use.

    Args:
        head: the module that makes logits.
        by_rows: whether rows have adapters of their own in this forward.
    """
    if recorded() or transformed():
        return WholeHead(head)
    plain = untouched(head, Linear)
    if plain is not None:
        # A matrix of another class, spread over processes for one, knows more than its numbers.
        parameters = [plain.weight] if plain.bias is None else [plain.weight, plain.bias]
        return (
            _Matrix(plain)
            if all(type(x) in (nn.Parameter, Tensor) for x in parameters)
            else WholeHead(head)
        )
    adapted = isinstance(vars(head).get("forward"), AdaptedForward)
    if type(head) is Linear and not adapted and (others := spread_ids(head)) is not None:
        return _Spread(head, others)
    if isinstance(head, QuantizedLinear) and not hooked(head):
        return _Module(head)
    if adapted and not (by_rows or called_only(head) or any(map(_drops, head.modules()))):
        return _Module(head) if isinstance(head, Linear | QuantizedLinear) else WholeHead(head)
    return WholeHead(head)


def token_logprobs(hidden: Tensor, head: nn.Module, ids: Tensor) -> Tensor:
    """Return log p of each id, (...) in float32, without materialising the logits.

    It is 0 where an id is -100. Gradients reach the states and the head.

    Args:
        hidden: (..., C) the states that predict the ids.
        head: the module that makes logits of states.
        ids: (...).

    Raises:
        InputError: an id is none of the head's.
    """
    return scored(head).sums(hidden, ids).log_prob


def _drops(module: nn.Module) -> bool:
    return isinstance(module, LowRank) and module.training and module.dropout > 0


def _version(x: Tensor) -> int:
    # What inference mode made is not counted.
    return 0 if x.is_inference() else x._version


def _mode(device: str) -> Callable[[], AbstractContextManager[object]]:
    """Return a function that restores the current grad and autocast modes."""
    derives, casts = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)

    def enter() -> AbstractContextManager[object]:
        modes = ExitStack()
        modes.enter_context(torch.set_grad_enabled(derives))
        modes.enter_context(torch.autocast(device, dtype, enabled=casts))
        return modes

    return enter
