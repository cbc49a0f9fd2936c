"""Quantised keys, values and latents."""

import torch
from torch import Tensor

from quintet.cache.base import Cache
from quintet.cache.dense import DynamicSlot, _slots
from quintet.cache.recurrent import RecurrentSlot
from quintet.cache.segment import Segment
from quintet.cache.slots import StateSlot
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.ops.vector_codes import VectorCode


class QuantizedSlot:
    """Keys and values as quantised vectors in growing buffers, decoded one layer at a time.

    Tokens are coded as they come and seen only through their codes, by themselves too. So what a
    text leaves in the cache, and what follows from it, does not depend on how it was cut up.
    """

    def __init__(self, code: VectorCode) -> None:
        self.code = code
        self._codes = DynamicSlot()
        self._scales = DynamicSlot()
        self._dtype = torch.float32

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D); return all (B, K, S, D) its rows attend to.

        Raises:
            InputError: vectors of this size do not fill whole bytes, or a gradient is asked for.
        """
        _check_no_gradient(keys, values)
        self._dtype = keys.dtype
        key_codes, key_scales = self.code.encode(keys)
        value_codes, value_scales = self.code.encode(values)
        self._codes.update(key_codes, value_codes, segment)
        self._scales.update(key_scales, value_scales, segment)
        return self.content(segment.keys, segment.rows)

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return None: the buffers hold codes."""
        return None

    def content(self, length: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of some rows, (B, K, length, D) each.

        Raises:
            InputError: nothing is stored yet.
        """
        codes, scales = self._codes.content(length, rows), self._scales.content(length, rows)
        return (
            self.code.decode(codes[0], scales[0], self._dtype),
            self.code.decode(codes[1], scales[1], self._dtype),
        )

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        self._codes.select(rows)
        self._scales.select(rows)

    def crop(self, lengths: int | Tensor) -> None:
        """Do nothing: tokens behind a row's length are never read."""

    def snapshot(self, lengths: int | Tensor) -> None:
        """Do nothing: `crop` needs no preparation."""

    def reset(self) -> None:
        """Empty the slot."""
        self._codes.reset()
        self._scales.reset()

    @property
    def batch_size(self) -> int | None:
        """The number of rows, or None while empty."""
        return self._codes.batch_size

    @property
    def dtype(self) -> torch.dtype | None:
        """None: codes decode to any dtype."""
        return None

    @property
    def nbytes(self) -> int:
        """The allocated bytes of codes and scales."""
        return self._codes.nbytes + self._scales.nbytes


class QuantizedCache(Cache):
    """A growing cache with 8, 6 or 4 bits per number, and a scale per vector of a head.

    The states of recurrent layers, whose errors would add up over a text, are kept as they are.

    Args:
        config: the model's.
        nbits: of a number.

    Raises:
        InputError: another number of bits.
    """

    def __init__(self, config: PreTrainedConfig, nbits: int = 8) -> None:
        code = VectorCode(nbits)
        super().__init__(*_slots(config, lambda: QuantizedSlot(code), RecurrentSlot))
        self.nbits = nbits

    def recurrent(self, layer_idx: int, raw: Tensor | None = None) -> StateSlot:
        """Return a layer's recurrent state for updating.

        Raises:
            InputError: the cache keeps none for this layer, or one of another model, or keys and
                values behind this layer would have a gradient.
        """
        # Before a state has changed, which could not be left behind a length.
        _check_no_gradient(*(() if raw is None else (raw,)))
        return super().recurrent(layer_idx, raw)


def _check_no_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InputError(
            "keys and values in few bits have no gradient; run the model under torch.no_grad(), "
            "or train with a DynamicCache or none"
        )
