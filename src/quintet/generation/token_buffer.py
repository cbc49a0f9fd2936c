"""A growing buffer of token ids, right-aligned."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenBuffer:
    """Rows of ids; the last column holds every row's last token.

    Args:
        ids: (B, T).
        padding: (B,) how many leading columns of each row are no text; None for none.
        reserve: the number of columns to set memory aside for.
        copies: how often to repeat each row, copies side by side.
    """

    def __init__(
        self, ids: Tensor, padding: Tensor | None = None, *, reserve: int = 0, copies: int = 1
    ) -> None:
        if copies > 1:
            ids = ids.repeat_interleave(copies, dim=0)
            padding = None if padding is None else padding.repeat_interleave(copies)
        self._buffer = ids
        if reserve:
            self._buffer = ids.new_zeros(ids.shape[0], ids.shape[1] + reserve)
            self._buffer[:, : ids.shape[1]] = ids
        self._length = ids.shape[1]
        self.padding = padding

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> Tensor:
        """The ids (B, T), a view."""
        return self._buffer[:, : self._length]

    def lengths(self) -> Tensor:
        """Return the number of tokens per row, (B,)."""
        if self.padding is None:
            return torch.full(
                (self._buffer.shape[0],), self._length, device=self._buffer.device, dtype=torch.long
            )
        return self._length - self.padding

    def mask(self) -> Tensor:
        """Return (B, T), True for tokens and False for padding."""
        if self.padding is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        columns = torch.arange(self._length, device=self._buffer.device, dtype=torch.long)
        return columns >= self.padding[:, None]

    def append(self, tokens: Tensor | int) -> None:
        """Append tokens (B,) or (B, K), or one token for all rows."""
        if isinstance(tokens, Tensor) and tokens.ndim == 1:
            tokens = tokens[:, None]
        end = self._length + (tokens.shape[1] if isinstance(tokens, Tensor) else 1)
        if end > self._buffer.shape[1]:
            spare = self._buffer.new_zeros(self._buffer.shape[0], end - self._buffer.shape[1] + 64)
            self._buffer = torch.cat((self._buffer, spare), dim=1)
        self._buffer[:, self._length : end] = tokens
        self._length = end

    def cut(self, length: int) -> "TokenBuffer":
        """Return the first `length` columns, a view."""
        padding = None if self.padding is None else self.padding.clamp(max=length)
        return TokenBuffer(self._buffer[:, :length], padding)

    def accept(self, rows: Sequence[Sequence[int]]) -> None:
        """Append different numbers of tokens per row, shifting rows to stay aligned."""
        most = max(len(row) for row in rows)
        missing = [most - len(row) for row in rows]
        device = self._buffer.device
        tokens = torch.tensor(
            [[*row, *[0] * short] for row, short in zip(rows, missing, strict=True)],
            dtype=self._buffer.dtype,
            device=device,
        )
        self.append(tokens)
        if any(missing):
            # Column c of the result is column c - shift of its row.
            shift = torch.tensor(missing, device=device, dtype=torch.long)
            columns = torch.arange(self._length, device=device, dtype=torch.long) - shift[:, None]
            self._buffer = self.ids.gather(1, columns.clamp(min=0))
            self.padding = shift if self.padding is None else self.padding + shift

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        self._buffer = self._buffer[rows]
        self.padding = None if self.padding is None else self.padding[rows]
