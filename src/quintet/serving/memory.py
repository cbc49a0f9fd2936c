"""The memory of rows, and the number that fits."""

from dataclasses import dataclass, replace
from typing import cast

import torch

from quintet.errors import DoesNotFitError, InputError
from quintet.generation.following import rows_of
from quintet.generation.requests import Served
from quintet.generation.speculative.prediction import MTPModel
from quintet.modeling.base import PreTrainedModel
from quintet.ops.device_memory import free_memory
from quintet.serving.checks import check_count
from quintet.serving.limits import Limits
from quintet.serving.options import Speculation, check_speculation
from quintet.serving.scheduler import RowCost

# Of the memory there is, what rows and what was read before may take together, and the most of the
# latter.
SHARE, PREFIX_SHARE, MOST_PREFIX = 0.8, 0.15, 2 << 30
# Of a GPU, where nobody says how many: more wait longer for each token, and few send as many.
MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a model and its rows, for display.

    Attributes:
        weights: the bytes of the model's parameters and buffers, adapters included.
        row: the bytes of a row before its first token: recurrent states.
        token: the bytes of each of its tokens, with what drafts by prediction layers take where
            that is what is done for those who do not say.
        rows: how many rows there are.
        capacity: how many tokens each may have.
        memory: how many bytes the rows may hold together; None for all that they can.
        kept: how many bytes of what was read before are kept.
    """

    weights: int
    row: int
    token: int
    rows: int
    capacity: int
    memory: int | None
    kept: int

    @property
    def whole(self) -> int:
        """The bytes of all full rows, at most the limit."""
        full = self.rows * RowCost(self.row, self.token).of(self.capacity)
        return full if self.memory is None else min(full, self.memory)

    @property
    def tokens(self) -> int:
        """The number of tokens that fit all rows together."""
        most = self.rows * self.capacity
        if self.memory is None or not self.token:
            return most
        return min(most, max(self.memory - self.rows * self.row, 0) // self.token)


def room_of(model: Served, limits: Limits, cost: RowCost | None = None) -> Room:
    """Return the memory of a model with rows under these limits.

    Without a cost, they hold numbers as they are.
    """
    cost = cost_of(model, None) if cost is None else cost
    module = cast("torch.nn.Module", model)
    tensors = (*module.parameters(), *module.buffers())
    return Room(
        sum(x.nbytes for x in tensors),
        cost.row,
        cost.token,
        limits.rows,
        limits.capacity,
        limits.memory,
        limits.kept,
    )


def cost_of(model: Served, nbits: int | None) -> RowCost:
    """Measure a row's bytes by running one token."""
    return with_drafts(model, nbits, *_measured(model, nbits))


def with_drafts(model: Served, nbits: int | None, row: int, token: int) -> RowCost:
    """Return the cost of a row with prediction layers, given that of the main layers.

    Args:
        model: whose rows these are.
        nbits: bits a number in them.
        row: the bytes of a row without tokens.
        token: the bytes of each of its tokens.
    """
    depth = model.prediction_depth() if isinstance(model, MTPModel) else 0
    if not depth:
        return RowCost(row, token)
    config = model.config
    # Prediction layers are as the others, and what they keep is never in fewer bits.
    whole = token if nbits is None else _measured(model, None)[1]
    # A state and an embedding of each token are read.
    unread = 2 * config.hidden_size * cast("PreTrainedModel", model).dtype.itemsize
    return RowCost(row, token, whole * depth // config.num_hidden_layers, unread)


def _measured(model: Served, nbits: int | None) -> tuple[int, int]:
    rows = rows_of(model, 1, 1, nbits)
    found = rows.cache.bytes_of_rows()
    rows.end()
    return found


def limits_for(
    model: Served,
    *,
    memory: int | None = None,
    nbits: int | None = None,
    rows: int | None = None,
    capacity: int | None = None,
    kept: int | None = None,
    speculate: Speculation = "off",
) -> Limits:
    """Return limits whose rows and prefix cache fit a number of bytes.

    On a CPU, memory is taken as it is used: fewer rows than `rows` can be full at once where it is
    short; then those that came last give their row back, and go on later. A GPU's is taken at once,
    so that there are no more rows than can be full.

    Args:
        model: what is to be served.
        memory: bytes for rows and what is kept; most of what is free beside the model if not given.
        nbits: bits a number in the rows.
        rows: how many texts at once, at the most; if not given, as many as are of use, on a GPU as
            many as there is room for, up to 64.
        capacity: tokens of each; the model's context, up to 4,096, if not given.
        kept: bytes of what was read before; a part of the memory if not given.
        speculate: how the engine drafts; prediction layers ("mtp") keep something of each token.

    Raises:
        DoesNotFitError: not one row of this capacity fits.
        InputError: a number below its least, or a capacity beyond the model's context.
    """
    context = model.config.max_position_embeddings
    check_speculation(speculate)
    for name, given, least in (("memory", memory, 1), ("kept", kept, 0)):
        if given is not None:
            check_count(name, given, least)
    if capacity is not None:
        check_count("capacity", capacity, 1)
    if capacity is not None and capacity > context:
        raise InputError(
            f"capacity={capacity} is beyond the model's context of {context} tokens "
            "(max_position_embeddings)"
        )
    usual = Limits()
    limits = replace(
        usual,
        rows=usual.rows if rows is None else rows,
        capacity=min(usual.capacity, context) if capacity is None else capacity,
    )
    available = int(SHARE * free_memory(model.device)) if memory is None else memory
    kept = min(int(PREFIX_SHARE * available), MOST_PREFIX) if kept is None else kept
    cost = cost_of(model, nbits)
    if speculate == "mtp":
        cost = cost.drafting
    least, remaining = cost.of(limits.capacity), available - kept
    if least > remaining:
        fits = max(remaining - cost.row, 0) // cost.token if cost.token else 0
        raise DoesNotFitError(
            f"a row of {limits.capacity:,} tokens takes {_shown(least)} and there is room for "
            f"{_shown(max(remaining, 0))} beside {_shown(kept)} that are kept of what was read; "
            f"{fits:,} tokens fit: give less capacity, fewer bits (nbits), or more memory"
        )
    if model.device.type != "cpu":
        most = MOST_ROWS if rows is None else rows
        limits = replace(limits, rows=min(most, remaining // least) if least else most)
    return replace(limits, memory=remaining, kept=kept)


def _shown(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB" if nbytes < 10 << 30 else f"{nbytes / 2**30:,.1f} GiB"
