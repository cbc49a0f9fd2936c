"""The rows of an engine's sequences, and one forward over pieces of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, starmap
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from quintet.adapters.forwards import IN_USE
from quintet.adapters.rows import ByRow
from quintet.cache import Cache, PooledCache, RowContent
from quintet.configuration.base import PreTrainedConfig
from quintet.generation.fixed_step import FixedStep, Recording
from quintet.generation.speculative.pooled import PredictionRows
from quintet.generation.speculative.prediction import MTPModel, Seen
from quintet.ops.sending import sent
from quintet.parallel.experts import lockstep_of
from quintet.parallel.world import World


class Cached(Protocol):
    """Interface of a model whose forward continues rows of a cache."""

    config: PreTrainedConfig
    world: World | None

    @property
    def device(self) -> torch.device:
        """The device of input ids."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        past_key_values: Cache,
        use_cache: bool,
        logits_to_keep: int | Tensor,
        return_dict: bool,
        cu_seq_lens_q: Tensor | None = None,
    ) -> Any:
        """Return an output with the kept `logits`."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one row in a forward.

    Attributes:
        row: which one.
        ids: the tokens that follow what the row holds.
        keep: of how many of the last of them logits are needed.
        checked: of how many of these tokens are chosen: one behind each of a draft, and one more.
        adapter: the adapter of the row; None for what the model uses.
    """

    row: int
    ids: list[int]
    keep: int
    checked: int
    adapter: str | None = None


class Rows:
    """Rows of a pool, for a number of concurrent sequences.

    Args:
        model: what runs.
        count: how many rows there are.
        capacity: how many tokens each may hold.
        nbits: bits a number in them; None to keep numbers as they are.
        recording: how steps of one token a row are recorded; None to run them as they are.
    """

    def __init__(
        self,
        model: Cached,
        count: int,
        capacity: int,
        nbits: int | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.model, self.count = model, count
        self._lockstep = lockstep_of(model)
        self.cache = PooledCache(model.config, count, capacity, nbits)
        # Nobody else has this cache.
        self.cache.in_fused_session = True
        self._take_memory()
        if recording is None or self._lockstep is not None:
            self._fixed = None
        else:
            self._fixed = FixedStep(model, self.cache, count, recording)

    def open(self, *contents: RowContent) -> int | None:
        """Return a row with the given content, or None if all are taken."""
        if self._fixed is not None:
            self._fixed.look()
        return None if len(self.cache.rows) == self.count else self.cache.join(*contents)

    def close(self, row: int) -> None:
        """Free a row."""
        self.cache.free(row)

    def rewind(self, row: int, length: int) -> int:
        """Take a row back to a length, or the nearest one before."""
        return self.cache.rewind(row, length)

    def extract(self, row: int, start: int = 0, stop: int | None = None) -> RowContent:
        """Copy a row for a range of its tokens."""
        return self.cache.extract(row, start, stop)

    def prediction(self, capacity: int) -> PredictionRows:
        """Return an equal number of rows for the model's prediction layers."""
        return PredictionRows(cast("MTPModel", self.model), self.count, capacity)

    def end(self) -> None:
        """Do nothing: the rows are used no more."""

    @property
    def exchanges(self) -> bool:
        """Whether experts are elsewhere, among processes with sequences of their own."""
        return self._lockstep is not None

    def attend(self) -> bool:
        """Run once what others send to the experts here; return whether they sent something."""
        assert self._lockstep is not None
        return self._lockstep.attend()

    def leave(self, why: BaseException | None) -> None:
        """Attend until all others leave; or let all end, if this process failed."""
        assert self._lockstep is not None
        if why is None:
            self._lockstep.leave()
        else:
            self._lockstep.fail(why)

    def watch(self, pieces: Sequence[Piece]) -> tuple[Tensor, list[Seen]]:
        """Run the pieces in one forward; return the kept logits, and the states of each piece."""
        self.cache.seen = []
        try:
            logits = self.run(pieces)
            (states, embeds, _), *_ = self.cache.seen
        finally:
            self.cache.seen = None
        places = [self.cache.index(piece.row) for piece in pieces]
        order = sorted(range(len(pieces)), key=places.__getitem__)
        lengths = [len(pieces[number].ids) for number in order]
        parts = (torch.split(x.flatten(0, 1), lengths) for x in (states, embeds))
        seen = dict(zip(order, starmap(Seen, zip(*parts, strict=True)), strict=True))
        return logits, [seen[number] for number in range(len(pieces))]

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces in one forward; return the kept logits (N, V).

        Where this raises, the rows of the pieces have to be taken back to what they held.
        """
        for piece in pieces:
            if piece.checked > 1:
                # The way back from a draft that does not hold.
                self.cache.drop_snapshots(piece.row)
                self.cache.snapshot_row(piece.row)
        if self._fixed is not None and self.cache.seen is None and all(map(_is_step, pieces)):
            rows = [self.cache.index(one.row) for one in pieces]
            stepped = self._fixed.run(rows, [one.ids[0] for one in pieces])
            if stepped is not None:
                return stepped
        places = [self.cache.index(piece.row) for piece in pieces]
        given: list[Piece | None] = [None] * len(self.cache.rows)
        for place, piece in zip(places, pieces, strict=True):
            given[place] = piece
        lengths = [0 if piece is None else len(piece.ids) for piece in given]
        keeps = [0 if piece is None else piece.keep for piece in given]
        ids = [token for piece in given if piece is not None for token in piece.ids]
        T = lengths[0]
        with self._adapted([None if piece is None else piece.adapter for piece in given]):
            if lengths.count(T) == len(lengths) and keeps.count(keeps[0]) == len(keeps):
                logits = self._rectangle(ids, T, keeps[0])
            else:
                logits = self._packed(ids, lengths, keeps)
        if places == sorted(places):
            return logits
        parts = torch.split(logits, keeps)
        return torch.cat([parts[place] for place in places])

    def step_ahead(self, rows: Sequence[int], tokens: Tensor) -> Tensor | None:
        """Step rows with tokens (N,) that are on the device; return logits (N, V), or None.

        None if steps are not recorded, and nothing was done. Where this raises, the rows have to
        be taken back to what they held.
        """
        if self._fixed is None:
            return None
        return self._fixed.run([self.cache.index(row) for row in rows], tokens)

    @torch.no_grad()
    def _take_memory(self) -> None:
        """Allocate the pool by running one token.

        Few tokens go another way through layers there, and their last digits would tell.
        """
        row = self.cache.join()
        self._rectangle([0], 1, 1)
        self.cache.free(row)

    def _adapted(self, adapters: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use each row's adapter inside, if rows have their own."""
        if not any(adapters):
            return nullcontext()
        model = cast("ByRow", self.model)
        return model.each_row([IN_USE if name is None else name for name in adapters])

    def _rectangle(self, ids: list[int], T: int, keep: int) -> Tensor:
        rows = sent(ids, torch.long, self.model.device).view(-1, T)
        output = self.model(
            rows,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=max(keep, 1),
            return_dict=True,
        )
        logits: Tensor = output.logits[:, output.logits.shape[1] - keep :]
        return logits.flatten(0, 1)

    def _packed(self, ids: list[int], lengths: list[int], keeps: list[int]) -> Tensor:
        device = self.model.device
        ends = list(accumulate(lengths, initial=0))
        positions = [
            token
            for end, keep in zip(ends[1:], keeps, strict=True)
            for token in range(end - keep, end)
        ]
        output = self.model(
            sent([ids], torch.long, device),
            # Lengths are the host's, which it looks at.
            cu_seq_lens_q=torch.tensor(ends, dtype=torch.long, device="cpu"),
            past_key_values=self.cache,
            use_cache=True,
            # Of no tokens at all, logits are not made.
            logits_to_keep=sent(positions or [0], torch.long, device),
            return_dict=True,
        )
        logits: Tensor = output.logits[0]
        return logits[: len(positions)]


def _is_step(piece: Piece) -> bool:
    """Return whether a piece is one token whose successor is chosen."""
    return len(piece.ids) == piece.keep == piece.checked == 1 and piece.adapter is None
