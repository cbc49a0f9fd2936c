"""A batch of training."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of tokens, and which of them are to be predicted.

    Several texts in a row are told apart by `seq_idx`; rows of unequal length by `attention_mask`.
    Of pairs of answers, the preferred ones are the first half of the rows, the others in the same
    order the second.

    Attributes:
        input_ids: (B, T).
        labels: (B, T) the ids where they stand in the text, -100 where nothing is learned.
        seq_idx: (B, T) the number of each token's text in its row, or None for one text a row.
        attention_mask: (B, T), 1 for tokens and 0 for padding, or None for none of it.
        texts: how many texts these are, or parts of one.
    """

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor | None = None
    attention_mask: Tensor | None = None
    texts: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())
