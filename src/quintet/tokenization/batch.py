"""`BatchEncoding`: the output of a tokenizer."""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quintet.errors import InputError
from quintet.tokenization.options import check_choice
from quintet.tokenization.rows import TokenizedRow

if TYPE_CHECKING:
    import torch


class BatchEncoding(UserDict[str, Any]):
    """Columns by name (`batch["input_ids"]`, `batch.input_ids`), rows by number (`batch[0]`)."""

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encodings: Sequence[TokenizedRow] | None = None,
        *,
        tensor_type: str | None = None,
    ) -> None:
        self._rows = None if encodings is None else list(encodings)
        super().__init__(dict(data or {}))
        self.convert_to_tensors(tensor_type)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int):
            return self._row(item)
        if isinstance(item, slice):
            return {name: column[item] for name, column in self.data.items()}
        if item not in self.data:
            raise KeyError(f"{item!r}; there are {', '.join(self.data) or 'no columns'}")
        return self.data[item]

    def __getattr__(self, name: str) -> Any:
        # `copy` and `pickle` ask for names before `data` exists.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"BatchEncoding has no column or attribute {name!r}")

    @property
    def encodings(self) -> list[TokenizedRow] | None:
        """The rows with tokens, words and offsets; None if built from columns."""
        return self._rows

    @property
    def is_fast(self) -> bool:
        """Whether the rows know their tokens, words and offsets."""
        return self._rows is not None

    def convert_to_tensors(self, tensor_type: str | None = None) -> "BatchEncoding":
        """Turn every column into a tensor ("pt"), an array ("np"), or leave it (None).

        Raises:
            InputError: another kind is asked for, or rows differ in length.
        """
        check_choice("return_tensors", tensor_type, ("pt", "np", None))
        if tensor_type is not None:
            for name, column in self.data.items():
                self.data[name] = as_tensor(name, column, tensor_type)
        return self

    def to(
        self, device: "str | int | torch.device", *, non_blocking: bool = False
    ) -> "BatchEncoding":
        """Move the tensors to a device, in place, and return the batch.

        Raises:
            InputError: no column is a tensor.
        """
        import torch

        tensors = {k: v for k, v in self.data.items() if isinstance(v, torch.Tensor)}
        if not tensors:
            raise InputError(
                f"no column of the batch is a tensor, so none can go to {str(device)!r}; "
                "pass return_tensors='pt' to the tokenizer"
            )
        for name, tensor in tensors.items():
            self.data[name] = tensor.to(device, non_blocking=non_blocking)
        return self

    # -- rows ---------------------------------------------------------------------------------

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Return the tokens of a row as the vocabulary spells them."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return the word each token of a row belongs to."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return 0 for each token of the text, 1 for each of its pair."""
        return self._row(batch_index).sequence_ids

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the token that holds a character, or None: `(char)` or `(row, char)`."""
        row, char = _row_and(batch_or_char_index, char_index)
        columns = zip(self._row(row).offsets, self._row(row).sequence_ids, strict=True)
        for token, ((start, end), sequence) in enumerate(columns):
            if sequence == sequence_index and start <= char < end:
                return token
        return None

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> tuple[int, int] | None:
        """Return start and end of a token in its text: `(token)` or `(row, token)`."""
        row, token = _row_and(batch_or_token_index, token_index)
        if self._row(row).sequence_ids[token] is None:
            return None
        return self._row(row).offsets[token]

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> tuple[int, int] | None:
        """Return the first token of a word and the one after its last, or None."""
        row, word = _row_and(batch_or_word_index, word_index)
        columns = zip(self._row(row).word_ids, self._row(row).sequence_ids, strict=True)
        found = [i for i, pair in enumerate(columns) if pair == (word, sequence_index)]
        return (found[0], found[-1] + 1) if found else None

    def _row(self, index: int) -> TokenizedRow:
        if self._rows is None:
            raise InputError(
                "this batch was made from columns and has no rows to look into; "
                "only what tokenizer(...) returns has"
            )
        if not -len(self._rows) <= index < len(self._rows):
            raise InputError(f"row {index} of a batch of {len(self._rows)}")
        return self._rows[index]


def _row_and(first: int, second: int | None) -> tuple[int, int]:
    return (0, first) if second is None else (first, second)


def as_tensor(name: str, column: Any, kind: str) -> Any:
    """Convert a column to a tensor or array of 64-bit integers.

    Raises:
        InputError: the rows differ in length, or hold something other than numbers.
    """
    import numpy as np

    if kind == "pt":
        import torch

        if isinstance(column, torch.Tensor):
            return column
    if isinstance(column, list) and column and isinstance(column[0], list):
        lengths = sorted({len(row) for row in column})
        if len(lengths) > 1:
            raise InputError(
                f"the rows of {name!r} have from {lengths[0]} to {lengths[-1]} entries and make "
                "no tensor; pass padding=True, and truncation=True with max_length to cut"
            )
    if isinstance(column, np.ndarray):
        array = column
    else:
        try:
            array = np.asarray(column, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise InputError(f"the column {name!r} makes no tensor: {error}") from None
    if kind == "np":
        return array
    return torch.from_numpy(array)
