"""The rows of an engine's sequences, and their contents."""

from quintet.cache import RowContent
from quintet.errors import ContextLengthError, InputError
from quintet.generation.following import LedRows
from quintet.generation.rows import Rows
from quintet.generation.sequence import Sequence
from quintet.generation.speculative.drafting import PredictedDrafting
from quintet.generation.speculative.pacing import Pacing
from quintet.generation.speculative.pooled import PooledPrediction


class EngineRows:
    """The rows of an engine: sequences join, leave and are read."""

    capacity: int
    _rows: Rows | LedRows
    _placed: dict[Sequence, int]
    _prediction: PooledPrediction | None
    _paces_drafts: bool

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that have a row, in order of arrival."""
        return list(self._placed)

    @property
    def nbytes(self) -> int:
        """The bytes of the rows."""
        prediction_bytes = 0 if self._prediction is None else self._prediction.nbytes
        return self._rows.cache.nbytes + prediction_bytes

    def bytes_of_rows(self) -> tuple[int, int]:
        """Return the bytes of a row without tokens, and of each token."""
        return self._rows.cache.bytes_of_rows()

    def add(self, sequence: Sequence, *contents: RowContent) -> None:
        """Give a sequence a row; a removed one continues where it was.

        Args:
            sequence: what is to take part in steps.
            contents: what was extracted for its first ids, from its own row or from that of
                another that begins alike; these need not be run over, and are not used where
                something of them is to be known.

        Raises:
            InputError: it has a row, has ended, or there is none; or contents are not of its first
                ids, with at least one left to run over.
            ContextLengthError: it may become longer than a row.
        """
        if sequence in self._placed:
            raise InputError("the sequence is in this engine already")
        if sequence.finished:
            raise InputError(
                f"the sequence has ended ({sequence.finish_reason}); make another one to go on"
            )
        self.check_room(sequence)
        if sequence.watched is not None:
            # What is to be known of the prompt is found by running over it.
            contents = ()
            sequence.watched.restart()
        stored = contents[-1].stop if contents else 0
        begun = sequence.ahead is not None and stored == len(sequence.ids)
        if stored >= len(sequence.ids) and not begun:
            raise InputError(
                f"the contents are of {stored} tokens and the sequence has {len(sequence.ids)}; "
                "leave at least one for the next step, as in extract(sequence, 0, n)"
            )
        row = self._rows.open(*contents)
        if row is None:
            raise InputError(
                f"all {len(self._placed)} rows are taken; remove a sequence, or make an engine "
                "with more rows"
            )
        # A step that began is gone on with where the row holds what it ran over.
        sequence.computed = stored - begun
        sequence.ahead = sequence.ahead if begun else None
        self._placed[sequence] = row
        drafting, sampler = sequence.drafting, sequence.sampler
        if self._paces_drafts and drafting is not None and drafting.pacing is None:
            # What is drafted changes which numbers of its generator a token is drawn by, so that
            # one that has its own drafts whatever the others do.
            seeded = sampler.do_sample and sampler.generators is not None
            drafting.pacing = None if seeded else Pacing()
        if isinstance(drafting, PredictedDrafting):
            if self._prediction is None:
                self._prediction = PooledPrediction(self._rows.prediction(self.capacity))
            self._prediction.join(sequence)

    def check_room(self, sequence: Sequence) -> None:
        """Check that a row can hold the sequence at its maximum length.

        Raises:
            ContextLengthError: it has not.
        """
        most = sequence.prompt_length + sequence.max_new_tokens
        # The last token is run over by nobody.
        if most - 1 > self.capacity:
            raise ContextLengthError(
                f"a prompt of {sequence.prompt_length} and {sequence.max_new_tokens} new tokens do "
                f"not fit a row of {self.capacity}; set max_new_tokens, or make an engine of more "
                "capacity"
            )

    def extract(self, sequence: Sequence, start: int = 0, stop: int | None = None) -> RowContent:
        """Copy a sequence's row for a range of its ids.

        With recurrent layers, only up to where it is now can it be gone on from.

        Raises:
            InputError: it has no row, or the row does not hold these.
        """
        row = self._row(sequence)
        self._take_back(sequence)
        return self._rows.extract(row, start, stop)

    def length(self, sequence: Sequence) -> int:
        """Return the number of ids that a sequence's row holds.

        Raises:
            InputError: it has no row.
        """
        row = self._row(sequence)
        self._take_back(sequence)
        return min(self._rows.cache.length(row), len(sequence.ids))

    def remove(self, sequence: Sequence) -> None:
        """Free the row of a sequence.

        Raises:
            InputError: it has none.
        """
        self._rows.close(self._row(sequence))
        if self._prediction is not None:
            self._prediction.leave(sequence)
        sequence.apply_cancellation()
        del self._placed[sequence]

    def _rewind(self, sequence: Sequence) -> None:
        """Crop a sequence's row to the tokens that count as computed."""
        sequence.ahead = None
        row, before = self._placed[sequence], sequence.computed
        sequence.computed = self._rows.rewind(row, before)
        if sequence.watched is not None and sequence.computed < before:
            sequence.computed = self._rows.rewind(row, 0)
            sequence.watched.restart()

    def _take_back(self, sequence: Sequence) -> None:
        """Crop the row to all ids but the last.

        It does where some of a draft did not hold, or a step was interrupted before its choice.
        """
        if sequence.waiting < 1 and not sequence.only_reads:
            row = self._placed[sequence]
            sequence.computed = self._rows.rewind(row, len(sequence.ids) - 1)

    def _row(self, sequence: Sequence) -> int:
        row = self._placed.get(sequence)
        if row is None:
            raise InputError("the sequence is not in this engine; add it first")
        return row
