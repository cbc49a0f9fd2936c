"""Drafts by prediction layers for an engine's sequences, in one run of the layers."""

from collections.abc import Mapping
from collections.abc import Sequence as Sequences

import torch
from torch import Tensor

from quintet.generation.sequence import Sequence
from quintet.generation.speculative.candidates import DraftWriter
from quintet.generation.speculative.drafting import PredictedDrafting
from quintet.generation.speculative.prediction import MTPModel, Prediction, Seen, Writer


class PredictionRows:
    """The rows of prediction layers in an engine.

    Args:
        model: runs the layers.
        rows: how many sequences there is room for.
        capacity: how many tokens each.
    """

    def __init__(self, model: MTPModel, rows: int, capacity: int) -> None:
        self._pool = model.prediction_pool(rows, capacity)
        self._layers = Prediction(model, self._pool)

    @property
    def nbytes(self) -> int:
        """The bytes that the rows hold."""
        return self._pool.nbytes

    def join(self) -> int:
        """Return an empty row."""
        return self._pool.join()

    def free(self, row: int) -> None:
        """Free a row."""
        self._pool.free(row)

    def place(self, row: int) -> int:
        """Return a row's index among those in use."""
        return self._pool.index(row)

    def read(
        self, seen: Mapping[int, Seen], last: Tensor, batch: int, writer: Writer
    ) -> dict[int, Seen]:
        """Run the layers and draft, like `Prediction.read`."""
        before = self._pool.lengths(batch).clone()
        try:
            return self._layers.read(seen, last, batch, writer)
        except BaseException:
            self._pool.crop(before)
            raise


class PooledPrediction:
    """The rows of prediction layers for an engine's sequences, and their drafts.

    A sequence that comes with what was kept of it finds nothing here: the layers then know its text
    from there on, which costs drafts and no more.

    Args:
        rows: what the layers keep of sequences.
    """

    def __init__(self, rows: PredictionRows) -> None:
        self._rows = rows
        self._placed: dict[Sequence, int] = {}

    @property
    def nbytes(self) -> int:
        """The bytes that the rows hold."""
        return self._rows.nbytes

    def join(self, sequence: Sequence) -> None:
        """Give a sequence an empty row."""
        self._placed[sequence] = self._rows.join()

    def leave(self, sequence: Sequence) -> None:
        """Free a sequence's row, if it has one."""
        row = self._placed.pop(sequence, None)
        if row is not None:
            self._rows.free(row)
            _drafting(sequence).forget()

    def pace(self, sequence: Sequence) -> None:
        """Keep a row for a sequence only while it drafts."""
        awake = _drafting(sequence).awake
        if awake and sequence not in self._placed:
            self.join(sequence)
        elif not awake:
            self.leave(sequence)

    def draft(self, sequences: Sequences[Sequence]) -> None:
        """Run the layers over new states of some sequences, and draft."""
        drafting = []
        for sequence in sequences:
            writer = sequence.begin_draft() if sequence in self._placed else None
            if writer is not None:
                place = self._rows.place(self._placed[sequence])
                drafting.append((place, sequence, writer))
        if not drafting:
            return
        drafting.sort(key=lambda one: one[0])
        owners = {place: _drafting(sequence) for place, sequence, _ in drafting}
        seen = {place: one for place, own in owners.items() if (one := own.unread()) is not None}
        last = torch.tensor(
            [sequence.ids[-1] for _, sequence, _ in drafting], dtype=torch.long, device="cpu"
        )
        remaining = self._rows.read(
            seen,
            last.to(seen[drafting[0][0]].states.device),
            len(self._placed),
            _Rows([(sequence, writer) for _, sequence, writer in drafting]),
        )
        for place, states in remaining.items():
            owners[place].has_read(states)


class _Rows:
    """Writes each row's draft by its own writer; an error ends its sequence."""

    def __init__(self, rows: list[tuple[Sequence, DraftWriter]]) -> None:
        self._rows = rows

    @property
    def done(self) -> bool:
        """Whether every row's draft is complete."""
        return all(sequence.finished or writer.done for sequence, writer in self._rows)

    def write(self, logits: Tensor) -> None:
        """Append a token to each unfinished draft, from logits (n, V)."""
        for (sequence, writer), own in zip(self._rows, torch.split(logits, 1), strict=True):
            if sequence.finished or writer.done:
                continue
            try:
                writer.write(own)
            except Exception as error:
                sequence.fail(error)

    @property
    def last(self) -> Tensor:
        """The last tokens written, (n,)."""
        none = torch.zeros(1, dtype=torch.long, device="cpu")
        return torch.cat([writer.tokens[-1] if writer.tokens else none for _, writer in self._rows])


def _drafting(sequence: Sequence) -> PredictedDrafting:
    assert isinstance(sequence.drafting, PredictedDrafting)
    return sequence.drafting
