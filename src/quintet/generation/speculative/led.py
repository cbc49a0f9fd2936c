"""Prediction layers of an engine in several processes: one drafts, all run them."""

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from quintet.generation.speculative.pooled import PredictionRows
from quintet.generation.speculative.prediction import MTPModel, Seen, Writer
from quintet.parallel.agree import Agreement


class LedPredictionRows(PredictionRows):
    """Rows of the leading process, mirrored by the others."""

    def __init__(
        self,
        tell: Callable[..., None],
        agreement: Agreement,
        model: MTPModel,
        rows: int,
        capacity: int,
    ) -> None:
        self._tell, self._agreement = tell, agreement
        tell("predict", rows, capacity)
        super().__init__(model, rows, capacity)

    def join(self) -> int:
        """Return an empty row."""
        self._tell("predict.join")
        return super().join()

    def free(self, row: int) -> None:
        """Free a row."""
        self._tell("predict.free", row)
        super().free(row)

    def read(
        self, seen: Mapping[int, Seen], last: Tensor, batch: int, writer: Writer
    ) -> dict[int, Seen]:
        """Run the layers in all processes, and draft."""
        widths = {place: len(one) for place, one in seen.items()}
        self._tell("predict.read", list(widths.items()), last.tolist(), batch, writer.done)
        read = Seen.joined(list(seen.values()))
        for x in (read.states, read.embeds):
            self._agreement.broadcast(x)
        return super().read(seen, last, batch, _Telling(self._agreement, writer))


def read_beside(
    model: Any,
    agreement: Agreement,
    rows: PredictionRows,
    widths: list[list[int]],
    last: list[int],
    batch: int,
    done: bool,
) -> None:
    """Run this process's layers on the leading process's order."""
    total = sum(width for _, width in widths)
    shape = total, model.config.hidden_size
    states, embeds = (
        agreement.broadcast(torch.empty(shape, dtype=model.dtype, device=model.device))
        for _ in range(2)
    )
    places = [place for place, _ in widths]
    spans = pairwise(accumulate((width for _, width in widths), initial=0))
    seen = {
        place: Seen(states[start:end], embeds[start:end])
        for place, (start, end) in zip(places, spans, strict=True)
    }
    tokens = torch.tensor(last, device=model.device, dtype=torch.long)
    rows.read(seen, tokens, batch, _Told(agreement, tokens, done))


class _Telling:
    """Writes drafts, and broadcasts them."""

    def __init__(self, agreement: Agreement, writer: Writer) -> None:
        self._agreement, self._writer = agreement, writer

    @property
    def done(self) -> bool:
        """Whether every row's draft is complete."""
        return self._writer.done

    @property
    def last(self) -> Tensor:
        """The last tokens written, (n,)."""
        return self._writer.last

    def write(self, logits: Tensor) -> None:
        """Append a token to every row's draft, from logits (n, V)."""

        def written() -> Tensor:
            self._writer.write(logits)
            last = self._writer.last
            return torch.cat((last.new_tensor([self._writer.done]), last))

        self._agreement.decided(written)


class _Told:
    """Receives drafts from the leading process."""

    def __init__(self, agreement: Agreement, last: Tensor, done: bool) -> None:
        self._agreement = agreement
        self.last, self.done = last, done

    def write(self, logits: Tensor) -> None:
        """Receive a token of every row."""

        def nothing() -> Tensor:
            raise AssertionError("another process writes")

        done, *last = self._agreement.decided(nothing).tolist()
        self.done, self.last = bool(done), self.last.new_tensor(last)
