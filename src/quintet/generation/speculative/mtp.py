"""Drafts by a model's own layers of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, §2.2).

Layer k joins, at position t, what the layer before it made there (the main run, for k = 1) with the
embedding of token t + k, and predicts token t + k + 1. Its keys and values have a cache of their
own, which holds positions for which all these tokens are known; what drafted tokens left in it is
taken back.
"""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.cache import Cache, Segment
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft, DraftWriter
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.ragged import ragged

__all__ = ["MTPCache", "MTPDrafter", "MTPModel"]


@runtime_checkable
class MTPModel(Protocol):
    """What a model with prediction layers offers."""

    def prediction_depth(self) -> int:
        """Count the prediction layers."""
        ...

    def prediction_cache(self) -> Cache:
        """Return an empty cache for them."""
        ...

    def predict(
        self, depth: int, states: Tensor, ahead: Tensor, segment: Segment, cache: Cache
    ) -> Tensor:
        """Return the states (B, W, C) of one prediction layer, 0 being the first."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., C) of ids."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        ...


@dataclass(slots=True)
class _Seen:
    """The main run's states and embeddings (B, W, C) at some columns.

    The mask (B, W) tells which of them count; None for all.
    """

    states: Tensor
    embeds: Tensor
    mask: Tensor | None

    def repeat(self, copies: int) -> "_Seen":
        """Repeat every row, copies side by side."""
        return _Seen(
            self.states.repeat_interleave(copies, dim=0),
            self.embeds.repeat_interleave(copies, dim=0),
            None if self.mask is None else self.mask.repeat_interleave(copies, dim=0),
        )

    def last(self, columns: int) -> "_Seen":
        """Return the last of the columns that count in each row."""
        if self.mask is None:
            return _Seen(self.states[:, -columns:], self.embeds[:, -columns:], None)
        from_end = self.mask.flip(1).to(torch.long).cumsum(dim=1).flip(1)
        return _Seen(self.states, self.embeds, self.mask & (from_end <= columns))

    @classmethod
    def joined(cls, pieces: "list[_Seen]") -> "_Seen":
        """Join states that were seen one after another."""
        if len(pieces) == 1:
            return pieces[0]
        mask = None
        if any(piece.mask is not None for piece in pieces):
            mask = torch.cat([piece.full_mask() for piece in pieces], dim=1)
        return cls(
            torch.cat([piece.states for piece in pieces], dim=1),
            torch.cat([piece.embeds for piece in pieces], dim=1),
            mask,
        )

    def full_mask(self) -> Tensor:
        """Return the mask, also where all columns count."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)


@dataclass(slots=True)
class MTPCache:
    """The cache of the prediction layers, which goes with the rows of a main one.

    Attributes:
        cache: theirs.
        until: (B,) how long the main rows were when it was left; None while drafts are made.
    """

    cache: Cache
    until: Tensor | None = None

    @classmethod
    def beside(cls, main: Cache, model: MTPModel) -> Self:
        """Return the companion of a main cache, to go on with, or put an empty one there.

        Where the main one was cropped in between, it is too; where the main one went on without
        the layers, they miss what they did not see, which costs them nothing but drafts.
        """
        held = main.companion
        if not isinstance(held, cls):
            held = main.companion = cls(model.prediction_cache())
        if held.until is not None:
            cut = (held.until - main.lengths(len(held.until), held.until.device)).clamp(min=0)
            held.cache.crop(held.cache.lengths(len(cut), cut.device) - cut)
            held.until = None
        return held

    def select(self, rows: Tensor) -> None:
        """Keep the given rows (N,) of the batch, in that order, each as often as it is named."""
        self.cache.batch_select_indices(rows)
        if self.until is not None:
            self.until = self.until[rows.to(self.until.device)]

    @property
    def nbytes(self) -> int:
        """The bytes of the layers' cache."""
        return self.cache.nbytes


class MTPDrafter:
    """Lets the prediction layers write the draft.

    Beyond their number, the last layer goes on with its own states, position by position, as
    serving engines do (EAGLE, arXiv:2401.15077).

    Args:
        model: runs them.
        main: the main run's cache, which has that of the layers beside it. What its forwards make
            is taken from it, so that of two generations by one model each sees its own.
        threshold: a draft ends with a token that is less probable than that.
    """

    def __init__(self, model: MTPModel, main: Cache, *, threshold: float) -> None:
        self.model = model
        self.main = main
        self._held = MTPCache.beside(main, model)
        self.cache = self._held.cache
        self.threshold = threshold
        self._depth = model.prediction_depth()
        self._seen: list[_Seen] = []
        main.seen = []

    def propose(
        self, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Sampler
    ) -> Draft:
        """Draft by the prediction layers, which read first what the main run read."""
        states, ahead, counts = self._read(text.ids[:, -1], unfinished)
        B, W, _ = states.shape
        writer = DraftWriter(text, wanted, sampler, self.threshold)
        segment = self.cache.segment(B, W, states.device, counts)
        for k in range(self._depth):
            if k:
                # The token that layer k - 1 has drafted is the one that layer k has not seen.
                ahead = _followed(ahead, self.model.embed(writer.tokens[-1]), counts)
            states = self.model.predict(k, states, ahead, segment, self.cache)
            here = _at_end(states, counts)
            # Layers that are not asked for a token read the text all the same.
            if not writer.done:
                writer.write(self.model.logits(here))
        self.cache.advance(segment)
        steps = 0
        while not writer.done:
            embeds = self.model.embed(writer.tokens[-1])[:, None]
            one = self.cache.segment(B, 1, embeds.device, None)
            states = self.model.predict(self._depth - 1, here[:, None], embeds, one, self.cache)
            self.cache.advance(one)
            here = states[:, 0]
            writer.write(self.model.logits(here))
            steps += 1
        self._take_back(steps, counts, W)
        return writer.draft()

    def accepted(self, counts: list[int]) -> None:
        """Keep of the last forward what belongs to tokens that were taken."""
        self._look()
        seen, most = self._seen[-1], max(counts)
        states, embeds, mask = seen.states[:, :most], seen.embeds[:, :most], None
        if min(counts) < most:
            places = torch.arange(most, device=states.device)
            mask = places < torch.tensor(counts, device=states.device)[:, None]
        self._seen[-1] = _Seen(states, embeds, mask)

    def finish(self, text: TokenBuffer) -> None:
        """Read what the main run read last, so that the next generation can go on from here."""
        B = len(text.ids)
        states, ahead, counts = self._read(text.ids[:, -1], [True] * B)
        W = states.shape[1]
        segment = self.cache.segment(B, W, states.device, counts)
        for k in range(self._depth):
            if k:
                # What lies further ahead is not there yet: those places are read again.
                ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))
            states = self.model.predict(k, states, ahead, segment, self.cache)
        self.cache.advance(segment)
        self._take_back(0, counts, W)
        self._held.until = self.main.lengths(B).clone()

    def close(self) -> None:
        """Stop watching the main run."""
        self.main.seen = None

    def _look(self) -> None:
        """Take over what the main run has made since."""
        if self.main.seen:
            self._seen += (_Seen(*made) for made in self.main.seen)
            self.main.seen.clear()

    def _read(self, last: Tensor, unfinished: list[bool]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return states and the embeddings ahead of them, (B, W, C), and how many count, (B,)."""
        self._look()
        pieces, B = self._seen, len(last)
        if len(pieces[0].states) != B:
            pieces = [one.repeat(B // len(one.states)) for one in pieces]
        seen = _Seen.joined(pieces)
        if not all(unfinished):
            seen.mask = seen.full_mask() & torch.tensor(unfinished, device=last.device)[:, None]
        rows = None if seen.mask is None else ragged(seen.mask)
        counts = None if rows is None else rows.counts
        if rows is not None:
            width = max(int(rows.counts.max()), 1)
            states, embeds = (rows.pack(x)[:, :width] for x in (seen.states, seen.embeds))
            mask = torch.arange(width, device=last.device) < rows.counts[:, None]
            seen = _Seen(states, embeds, mask)
        # Deeper layers have to read the last columns again, knowing the tokens by then.
        again = self._depth - 1
        self._seen = [seen.last(again)] if again else []
        return seen.states, _followed(seen.embeds, self.model.embed(last), counts), counts

    def _take_back(self, steps: int, counts: Tensor | None, W: int) -> None:
        """Take what drafted tokens left in the cache out of it again."""
        again = self._depth - 1
        if counts is None:
            if steps + min(again, W):
                self.cache.crop(-(steps + min(again, W)))
        elif steps or again:
            held = self.cache.lengths(len(counts), counts.device)
            self.cache.crop(held - steps - counts.clamp(max=again))


def _at_end(x: Tensor, counts: Tensor | None) -> Tensor:
    """Return the last of the first `counts` (B,) columns of each row, (B, C)."""
    if counts is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), counts - 1]


def _followed(embeds: Tensor, last: Tensor, counts: Tensor | None) -> Tensor:
    """Shift columns by one: the first `counts` (B,) get the next one, the last of them `last`."""
    if counts is None:
        return torch.cat((embeds[:, 1:], last[:, None]), dim=1)
    ahead = F.pad(embeds[:, 1:], (0, 0, 0, 1))
    ahead[torch.arange(len(last), device=last.device), counts - 1] = last
    return ahead
