"""Drafting with layers of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, §2.2).

Layer k joins, at position t, what the layer before it made there (the main run, for k = 1) with the
embedding of token t + k, and predicts token t + k + 1. Its keys and values have a cache of their
own, which holds positions for which all these tokens are known; what drafted tokens left in it is
taken back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from quintet.cache import Cache, PooledCache, Segment, segments_of

# The slots of all rows, and the rectangles that the tokens make.
Segments = tuple[Segment, tuple[Segment, ...]]


@runtime_checkable
class MTPModel(Protocol):
    """Interface of a model with prediction layers."""

    def prediction_depth(self) -> int:
        """Return the number of prediction layers."""
        ...

    def prediction_cache(self) -> Cache:
        """Return an empty cache for them."""
        ...

    def prediction_pool(self, rows: int, capacity: int) -> PooledCache:
        """Return an empty pool for them."""
        ...

    def predict(
        self, depth: int, states: Tensor, ahead: Tensor, taken: Segments, cache: Cache
    ) -> Tensor:
        """Return the states (B, W, C) of prediction layer `depth`, from 0."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., C) of ids."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        ...


class Writer(Protocol):
    """Writes drafts for n rows, token by token."""

    @property
    def done(self) -> bool:
        """Whether every row's draft is complete."""
        ...

    def write(self, logits: Tensor) -> None:
        """Append a token to every row's draft, from logits (n, V)."""
        ...

    @property
    def last(self) -> Tensor:
        """The last tokens written, (n,)."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """The main run's states of tokens of one row, and their embeddings: (W, C) both."""

    states: Tensor
    embeds: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def first(self, count: int) -> "Seen":
        """Return the first tokens' entries."""
        return self if count >= len(self) else Seen(self.states[:count], self.embeds[:count])

    def last(self, count: int) -> "Seen":
        """Return the last tokens' entries."""
        start = max(len(self) - count, 0)
        return Seen(self.states[start:], self.embeds[start:])

    @classmethod
    def joined(cls, pieces: "Sequence[Seen]") -> Self:
        """Concatenate several."""
        if len(pieces) == 1:
            return cls(pieces[0].states, pieces[0].embeds)
        return cls(
            torch.cat([piece.states for piece in pieces]),
            torch.cat([piece.embeds for piece in pieces]),
        )

    @classmethod
    def rows(cls, states: Tensor, embeds: Tensor, mask: Tensor | None) -> list[Self]:
        """Split (B, T, C) into rows, dropping padding by a mask (B, T)."""
        if mask is None:
            return [cls(*row) for row in zip(states, embeds, strict=True)]
        return [cls(x[text], e[text]) for x, e, text in zip(states, embeds, mask, strict=True)]


class Prediction:
    """Runs a model's prediction layers over the main run's states.

    Beyond their number, the last layer goes on with its own states, position by position, as
    serving engines do (EAGLE, arXiv:2401.15077).

    Args:
        model: runs them.
        cache: what they keep.
    """

    def __init__(self, model: MTPModel, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._depth = model.prediction_depth()

    def read(
        self, seen: Mapping[int, Seen], last: Tensor, batch: int, writer: Writer | None
    ) -> dict[int, Seen]:
        """Run the layers over new states, and draft.

        Args:
            seen: what the main run has made of rows since they read last, by the rows' places in
                the cache, in order; at least one token each.
            last: (n,) the token behind those.
            batch: how many rows the cache has.
            writer: writes the drafts; None to read only.

        Returns:
            What has to be read again together with what comes next: deeper layers did not know all
            tokens ahead of the last ones.
        """
        model, widths = self.model, [len(one) for one in seen.values()]
        ends = [end - 1 for end in accumulate(widths)]
        read = Seen.joined(list(seen.values()))
        states, ahead = read.states, _followed(read.embeds, model.embed(last), ends)
        taken = self._taken(dict(zip(seen, widths, strict=True)), batch, last.device)
        for k in range(self._depth):
            if k:
                # The token that layer k - 1 has drafted is the one that layer k has not seen.
                known = None if writer is None else model.embed(writer.last)
                following = torch.zeros_like(_gather_last(ahead, ends)) if known is None else known
                ahead = _followed(ahead, following, ends)
            states = self._predict(k, states, ahead, taken)
            # Layers that are not asked for a token read the text all the same.
            if writer is not None and not writer.done:
                writer.write(model.logits(_gather_last(states, ends)))
        self.cache.advance(taken[0])
        steps, hidden = 0, _gather_last(states, ends)
        while writer is not None and not writer.done:
            taken = self._taken(dict.fromkeys(seen, 1), batch, last.device)
            hidden = self._predict(self._depth - 1, hidden, model.embed(writer.last), taken)
            self.cache.advance(taken[0])
            writer.write(model.logits(hidden))
            steps += 1
        kept_states = self._depth - 1
        self._take_back([steps + min(kept_states, width) for width in widths], list(seen), batch)
        return {row: one.last(kept_states) for row, one in seen.items()}

    def _predict(self, depth: int, states: Tensor, ahead: Tensor, taken: Segments) -> Tensor:
        """Return the states (N, C) of one layer, for packed tokens."""
        rectangular = taken[1][0].tokens is None
        shape = (-1, taken[0].length) if rectangular else (1, -1)
        states, ahead = (torch.unflatten(x, 0, shape) for x in (states, ahead))
        return self.model.predict(depth, states, ahead, taken, self.cache).flatten(0, 1)

    def _taken(self, widths: Mapping[int, int], batch: int, device: torch.device) -> Segments:
        """Return the slots of this many tokens in each of some rows."""
        longest = max(widths.values())
        lengths = [widths.get(row, 0) for row in range(batch)]
        if lengths.count(longest) == batch:
            whole = self.cache.segment(batch, longest, device, None)
            return whole, (whole,)
        counts = torch.tensor(lengths, dtype=torch.long, device="cpu")
        whole = self.cache.segment(batch, longest, device, counts)
        return whole, segments_of(whole, lengths)

    def _take_back(self, tokens: list[int], rows: list[int], batch: int) -> None:
        """Crop drafted tokens from the cache."""
        if not any(tokens):
            return
        if len(rows) == batch and len(set(tokens)) == 1:
            self.cache.crop(-tokens[0])
            return
        lengths = self.cache.lengths(batch).clone()
        lengths[rows] -= torch.tensor(tokens, dtype=torch.long, device="cpu")
        self.cache.crop(lengths)


def _gather_last(x: Tensor, ends: list[int]) -> Tensor:
    """Return the last entry of each packed row, (n, C) of (N, C)."""
    return x[-1:] if len(ends) == 1 else x[ends]


def _followed(embeds: Tensor, last: Tensor, ends: list[int]) -> Tensor:
    """Shift packed rows (N, C) by one; each ends with its `last`."""
    if len(ends) == 1:
        return torch.cat((embeds[1:], last))
    ahead = embeds.roll(-1, dims=0)
    ahead[ends] = last
    return ahead
