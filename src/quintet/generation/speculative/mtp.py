"""Drafts of `generate()` by prediction layers, with a cache beside the main one."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft, DraftWriter
from quintet.generation.speculative.prediction import MTPModel, Prediction, Seen
from quintet.generation.token_buffer import TokenBuffer


@dataclass(slots=True)
class MTPCache:
    """The cache of the prediction layers, a companion of the main one.

    Attributes:
        cache: theirs.
        until: (B,) how long the main rows were when it was left; None while drafts are made.
    """

    cache: Cache
    until: Tensor | None = None

    @classmethod
    def companion_of(cls, main: Cache, model: MTPModel) -> Self:
        """Return the companion of a main cache, or attach an empty one.

        Where the main one was cropped in between, it is too; where the main one went on without
        the layers, they miss what they did not see, which costs them nothing but drafts.
        """
        companion = main.companion
        if not isinstance(companion, cls):
            companion = main.companion = cls(model.prediction_cache())
        if companion.until is not None:
            cut = (
                companion.until - main.lengths(len(companion.until), companion.until.device)
            ).clamp(min=0)
            companion.cache.crop(companion.cache.lengths(len(cut), cut.device) - cut)
            companion.until = None
        return companion

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        self.cache.batch_select_indices(rows)
        if self.until is not None:
            self.until = self.until[rows.to(self.until.device)]

    @property
    def nbytes(self) -> int:
        """The bytes of the layers' cache."""
        return self.cache.nbytes


class MTPDrafter:
    """Drafts with the model's prediction layers.

    Args:
        model: runs them.
        main: the main run's cache, which has that of the layers beside it. What its forwards make
            is taken from it, so that of two generations by one model each sees its own.
        threshold: a draft ends with a token that is less probable than that.
    """

    def __init__(self, model: MTPModel, main: Cache, *, threshold: float) -> None:
        self.main = main
        self.threshold = threshold
        self._companion = MTPCache.companion_of(main, model)
        self._layers = Prediction(model, self._companion.cache)
        # What each forward since has made, of each row.
        self._seen: list[list[Seen]] = []
        main.seen = []

    def propose(
        self, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Sampler
    ) -> Draft:
        """Draft with the prediction layers, after they have read the new states."""
        writer = DraftWriter(text, wanted, sampler, self.threshold)
        rows = [row for row, active in enumerate(unfinished) if active]
        self._read(text, rows, _RowsOf(writer, rows, len(unfinished)))
        return writer.draft()

    def accepted(self, counts: list[int]) -> None:
        """Keep the last forward's states of accepted tokens."""
        self._look()
        self._seen[-1] = [
            one.first(count) for one, count in zip(self._seen[-1], counts, strict=True)
        ]

    def finish(self, text: TokenBuffer) -> None:
        """Read the last states, so that another generation can continue."""
        B = len(text.ids)
        self._read(text, list(range(B)), None)
        self._companion.until = self.main.lengths(B).clone()

    def close(self) -> None:
        """Stop recording the main run."""
        self.main.seen = None

    def _read(self, text: TokenBuffer, rows: list[int], writer: "_RowsOf | None") -> None:
        self._look()
        B = len(text.ids)
        unread = [Seen.joined(pieces) for pieces in zip(*self._seen, strict=True)]
        if len(unread) != B:
            # Rows of the prompt are gone on with several times.
            unread = [one for one in unread for _ in range(B // len(unread))]
        seen = {row: unread[row] for row in rows if len(unread[row])}
        if seen:
            last = text.ids[:, -1]
            last = last if len(seen) == B else last[list(seen)]
            for row, unread_states in self._layers.read(seen, last, B, writer).items():
                unread[row] = unread_states
        self._seen = [unread]

    def _look(self) -> None:
        """Take over the main run's new states."""
        if self.main.seen:
            self._seen += (Seen.rows(*states) for states in self.main.seen)
            self.main.seen.clear()


class _RowsOf:
    """Writes the drafts of some rows of a batch.

    Args:
        writer: that of the whole batch.
        rows: which rows are written.
        batch: how many there are.
    """

    def __init__(self, writer: DraftWriter, rows: list[int], batch: int) -> None:
        self._writer = writer
        self._rows = None
        if len(rows) != batch:
            self._rows = torch.tensor(rows, dtype=torch.long, device="cpu")
        self._batch = batch

    @property
    def done(self) -> bool:
        """Whether every row's draft is complete."""
        return self._writer.done

    def write(self, logits: Tensor) -> None:
        """Append a token to every row's draft, from logits (n, V)."""
        if self._rows is not None:
            # The others' tokens are asked for by nobody.
            whole = logits.new_zeros(self._batch, logits.shape[1])
            logits = whole.index_copy(0, self._rows.to(logits.device), logits)
        self._writer.write(logits)

    @property
    def last(self) -> Tensor:
        """The last tokens written, (n,)."""
        tokens = self._writer.tokens[-1]
        return tokens if self._rows is None else tokens[self._rows.to(tokens.device)]
