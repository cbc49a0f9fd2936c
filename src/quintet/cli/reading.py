"""The part of a conversation that the model has read, so that a turn reads only new tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quintet.cache import Cache, Kept, QuantizedCache
from quintet.cli.options import Opened
from quintet.generation.config import GenerationConfig

# Places in the text to which recurrent layers can come back: where this turn and the one before
# asked for an answer.
PLACES = 2


@dataclass
class ReadingTurn:
    """A turn that can be continued.

    Attributes:
        cache: of what was read before; None if the options want another, or none.
        ids: the whole text, once it is complete.
    """

    cache: Cache | None
    ids: Sequence[int] | None = None


class Reading:
    """The cache of a model from one turn to the next, and the ids of which it holds the beginning.

    What a turn can use of it is found by comparing ids, so that the conversation may be changed in
    any way in between. Attention goes on from the first token that differs; recurrent layers from
    the last place before it of which a copy of their state was kept, or from the beginning.
    """

    def __init__(self, opened: Opened) -> None:
        self._model = opened.model
        self._new_cache = opened.generator_model.new_cache
        self._cache: Cache | None = None
        self._ids: Sequence[int] = []
        self._bits: int | None = None
        self._snapshots: list[tuple[int, Kept]] = []

    def cached_length(self, ids: Sequence[int], config: GenerationConfig) -> int:
        """Go back to the beginning of a prompt that was read; return its number of tokens."""
        bits = config.cache.bits if config.cache.kind == "quantized" else None
        if not _can_continue(config) or bits != self._bits:
            self._forget()
            self._bits = bits
        # The last token is run over in any case: what follows comes out of that.
        self._go_back(common(self._ids, ids[:-1]))
        return len(self._ids)

    @contextmanager
    def turn(
        self, ids: Sequence[int], config: GenerationConfig, stable: Callable[[], int]
    ) -> Iterator[ReadingTurn]:
        """Continue a prompt behind `cached_length`; set the turn's `ids` before this ends.

        Args:
            ids: of the prompt.
            config: says in what pieces it is read, and whether a cache can be handed on at all.
            stable: tells with how many of the ids the next turn begins, too, whatever the answer
                is; asked only for recurrent layers.
        """
        if not _can_continue(config) or len(ids) >= self._model.config.max_position_embeddings:
            yield ReadingTurn(None)
            return
        if self._cache is None:
            self._cache = (
                self._new_cache()
                if self._bits is None
                else QuantizedCache(self._model.config, self._bits)
            )
        turn = ReadingTurn(self._cache)
        try:
            if _is_recurrent(self._cache):
                self._read(ids, stable(), config.prefill_chunk_size)
            yield turn
        finally:
            # What was going on when it was stopped may have left drafts behind the prompt.
            text = ids if turn.ids is None else turn.ids
            length = min(self._cache.get_seq_length(), len(text))
            self._ids = text[:length]
            if turn.ids is None:
                self._go_back(length, whole=False)

    def _read(self, ids: Sequence[int], stable: int, chunk: int | None) -> None:
        """Read up to where the next turn will begin otherwise, and keep the states there."""
        assert self._cache is not None
        start = len(self._ids)
        if not start <= stable < len(ids) or any(length == stable for length, _ in self._snapshots):
            return
        with torch.no_grad():
            for begin in range(start, stable, chunk or stable):
                piece = [ids[begin : min(begin + (chunk or stable), stable)]]
                run = torch.tensor(piece, dtype=torch.long, device=self._model.device)
                self._model(run, past_key_values=self._cache, logits_to_keep=1)
        snapshot = self._cache.keep()
        if any(slot is not None and slot.remembers for slot in self._cache.states):
            # What drafts needed slows down what goes on without any.
            self._cache.restore(snapshot)
        self._ids = ids[:stable]
        self._snapshots = [*self._snapshots, (stable, snapshot)][-PLACES:]

    def _go_back(self, length: int, *, whole: bool = True) -> None:
        """Hold no more than the first tokens, or fewer where recurrent layers cannot do that.

        Args:
            length: how many of them.
            whole: what is held was left by a forward that ended.
        """
        if self._cache is None:
            return
        self._snapshots = [place for place in self._snapshots if place[0] <= length]
        if not _is_recurrent(self._cache):
            self._cache.crop(length)
        elif not whole or length < len(self._ids):
            if not self._snapshots:
                self._forget()
                return
            length, snapshot = self._snapshots[-1]
            self._cache.restore(snapshot)
        self._ids = self._ids[:length]

    def _forget(self) -> None:
        self._cache, self._ids, self._snapshots = None, [], []


def common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = zip(ids, others, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def _can_continue(config: GenerationConfig) -> bool:
    """Return whether a generation can continue another's cache, and leave it to a third."""
    alone = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    guided = config.guidance_scale not in (None, 1) or bool(config.token_healing)
    kind = config.use_cache is not False and config.cache.kind in ("dynamic", "quantized")
    return alone and not guided and kind


def _is_recurrent(cache: Cache) -> bool:
    return any(slot is not None for slot in cache.states)
