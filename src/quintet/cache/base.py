"""The cache of every family: one slot per layer, and a length for each row.

Every row of a batch has its own length from the start. A forward asks the cache where its tokens
go (`segment`), the layers write there, and the model moves the lengths once at the end (`advance`):
a forward that fails halfway leaves the cache as it was. Recurrent states cannot be left behind a
length like that: after such a failure the cache asks to be cropped or reset.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from quintet.cache.kept import Kept
from quintet.cache.memory import check_alike
from quintet.cache.segment import Segment
from quintet.cache.slots import AttentionSlot, Companion, StateSlot
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.ops.ragged import whole_length
from quintet.ops.sending import brought


class Cache:
    """The slots of all layers, and the number of tokens in each row.

    Attributes:
        companion: what somebody else keeps of the same rows, as drafting does; None for nothing.
        in_fused_session: whether the layers' weights, collected for the fused step, are kept for
            the next forward.
        fused_runs: those weights.
        keeps_nothing: whether a layer that runs again finds what it found, as nothing is kept.
        adapters: what is known of the adapters its tokens were made with, of each row or once for
            all; None for nothing.
        seen: where each forward that fills the cache puts the states and embeddings (B, T, C) of
            its tokens, and which of them are no padding, (B, T) or None for all; None to put
            nothing there.

    Args:
        layers: each layer's keys and values; None for a layer without attention.
        states: each layer's recurrent state; None for a layer without one.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSlot | None],
        states: Sequence[StateSlot | None] = (),
    ) -> None:
        self.layers = list(layers)
        self.states = list(states)
        self._lengths: int | Tensor = 0
        self._longest = 0
        # Recurrent states may already hold the tokens of a forward that has not ended.
        self._forward_unfinished = False
        self.companion: Companion | None = None
        self.in_fused_session = False
        self.fused_runs: object = None
        self.keeps_nothing = False
        self.adapters: tuple[Hashable, ...] | None = None
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] | None = None

    # -- one forward -------------------------------------------------------------------------

    def segment(
        self, batch: int, length: int, device: torch.device, counts: Tensor | None
    ) -> Segment:
        """Return the slots of the next `length` tokens of `batch` rows.

        Args:
            batch: how many rows there are.
            length: T.
            device: where the tokens are.
            counts: (B,) how many of the T are real, of the host where it knows them; None for all.

        Raises:
            InputError: the cache holds another number of rows, or what a failed forward left.
            ContextLengthError: a preallocated cache has no room for them.
        """
        if self._forward_unfinished:
            raise InputError(
                "an earlier forward failed halfway and left recurrent layers ahead of the cache's "
                "lengths; crop the cache to its last snapshot, or reset it"
            )
        if isinstance(self._lengths, Tensor):
            self._lengths = brought(self._lengths, device)
        rows = self.batch_size
        if rows is not None and rows != batch:
            raise InputError(
                f"the cache holds {rows} rows and the input has {batch}; "
                "use a new cache, or select its rows with batch_select_indices"
            )
        taken = None if counts is None else brought(counts, device)
        return Segment(self._lengths, length, self._longest + length, taken, device)

    def record_adapters(self, adapters: tuple[Hashable, ...]) -> None:
        """Record the adapters that tokens are computed with, one per row or one for all.

        Raises:
            InputError: a row holds tokens that were made with others.
        """
        before = self.adapters
        if before is not None and before != adapters and self._longest:
            lengths = self.lengths(max(len(before), len(adapters), self.batch_size or 1)).tolist()
            rows = len(lengths)
            was, now = (one * rows if len(one) == 1 else one for one in (before, adapters))
            if len(was) != len(now) or any(
                length and one != after
                for length, one, after in zip(lengths, was, now, strict=True)
            ):
                raise _other_adapters()
        self.adapters = adapters

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, segment: Segment | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (B, K, T, D); call `advance` after the last layer."""
        if segment is None:
            segment = self.segment(keys.shape[0], keys.shape[2], keys.device, None)
        return self._attention(layer_idx).update(keys, values, segment)

    def buffers(self, layer_idx: int, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return a layer's key and value buffers (B, K, S, D), with space for a segment.

        The caller writes them in place, instead of `update`; None if that cannot be done.
        """
        return self._attention(layer_idx).buffers(segment)

    def memory(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return a layer's pages of keys and values, (P, K, page, D), as a segment's table says.

        The caller writes them in place, instead of `update`; None if they lie otherwise.
        """
        return None

    def fit(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        """Check the number of layers and, if needed, the dtype of a model.

        Args:
            config: the model's.
            dtype: of its hidden states; None if that is no matter.

        Raises:
            InputError: there are more, or fewer, or what they hold is in another dtype.
        """
        layers = config.num_hidden_layers
        if len(self.layers) != layers:
            raise InputError(
                f"the cache has {len(self.layers)} layers and the model {layers}; "
                "use the cache of this model, or make one from its config"
            )
        cache_dtype = next((slot.dtype for slot in self.layers if slot is not None), None)
        if dtype is not None and cache_dtype is not None and cache_dtype != dtype:
            raise InputError(
                f"the cache holds {cache_dtype} and the model computes in {dtype}; use a new cache "
                "where a model has changed"
            )

    def recurrent(self, layer_idx: int, raw: Tensor | None = None) -> StateSlot:
        """Return a layer's recurrent state for updating.

        Args:
            layer_idx: of the layer.
            raw: (B, T, C) what is to enter the convolution.

        Raises:
            InputError: the cache keeps none for this layer, or one of another model.
        """
        slot = self.states[layer_idx] if self.states else None
        if slot is None:
            raise InputError(
                f"this {type(self).__name__} keeps no recurrent state for layer {layer_idx}; "
                "use the cache that the model returns, or make one from the model's config"
            )
        if raw is not None and slot.window is not None:
            check_alike("inputs of convolutions (channels)", slot.window, raw, 2)
        self._forward_unfinished = True
        return slot

    def advance(self, segment: Segment) -> None:
        """Count the tokens that every layer has stored."""
        self._finish(segment)
        if segment.counts is None:
            self._lengths = self._lengths + segment.length
            self._longest += segment.length
        else:
            self._lengths = self._lengths + segment.counts
            self._longest = _longest(self._lengths)

    def _finish(self, segment: Segment) -> None:
        self._forward_unfinished = False
        for slot in self.states:
            if slot is not None:
                slot.advance(segment)

    # -- what it holds -----------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        """The number of rows, or None before the first forward."""
        # A stage of a model fills the slots of its own layers alone.
        sizes = (slot.batch_size for slot in self._slots())
        return next((size for size in sizes if size is not None), None)

    def lengths(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the number of tokens in each of `batch` rows, (B,)."""
        if isinstance(self._lengths, int):
            return torch.full((batch,), self._lengths, dtype=torch.long, device=device)
        return self._lengths.to(device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the longest row."""
        return self._longest

    def get_max_cache_shape(self) -> int | None:
        """Return the number of tokens a row can hold, or None without limit."""
        return None

    @property
    def nbytes(self) -> int:
        """The bytes of all layers."""
        companion_bytes = 0 if self.companion is None else self.companion.nbytes
        return companion_bytes + sum(slot.nbytes for slot in self._slots())

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values, as the legacy tuples do."""
        return self._attention(layer_idx).content(self.get_seq_length())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        return True

    # -- changing it -------------------------------------------------------------------------

    def crop(self, max_length: int | Tensor) -> None:
        """Keep the first `max_length` tokens of every row, or of each row with a (B,) tensor.

        A negative number forgets that many from the end of its row.

        Raises:
            InputError: no whole numbers, a tensor of another shape than (B,), or recurrent layers
                have no snapshot to go back from.
        """
        lengths = self._lengths
        if not isinstance(max_length, Tensor) or max_length.ndim == 0:
            max_length = whole_length(max_length)
        elif max_length.is_floating_point() or max_length.is_complex():
            raise InputError(f"max_length is a tensor of {max_length.dtype}; lengths are whole")
        if isinstance(max_length, Tensor) and isinstance(lengths, int):
            rows = self.batch_size
            lengths = self.lengths(max_length.numel() if rows is None else rows, max_length.device)
        cropped: int | Tensor
        if isinstance(lengths, Tensor):
            limit = torch.as_tensor(max_length, dtype=torch.long, device=lengths.device)
            if limit.ndim and limit.shape != lengths.shape:
                raise InputError(
                    f"max_length has shape {tuple(limit.shape)} and the cache {len(lengths)} rows; "
                    "give one length, or one for each row"
                )
            cropped = torch.where(limit < 0, lengths + limit, torch.minimum(lengths, limit)).clamp(
                min=0
            )
        else:
            cropped = max(lengths + max_length if max_length < 0 else min(lengths, max_length), 0)
        if self.states and not self._forward_unfinished and _are_all(cropped == lengths):
            return
        for slot in self._slots():
            slot.crop(cropped)
        self._lengths, self._longest, self._forward_unfinished = cropped, _longest(cropped), False

    def snapshot(self) -> None:
        """Prepare for `crop` to the present lengths or any later point.

        Keys and values need no preparation and lose nothing by it. Recurrent states are copied,
        and keep what they take in until the next snapshot, so take one at every turn.
        """
        for slot in self._slots():
            slot.snapshot(self._lengths)

    def keep(self) -> Kept:
        """Copy the recurrent states, for any number of later `restore`.

        Keys and values are not copied. Unlike a snapshot it costs nothing in what follows, and
        only this very place can be come back to.
        """
        contents = [None if slot is None else slot.content() for slot in self.states]
        copies = [one and (one[0].clone(), one[1].clone()) for one in contents]
        return Kept(self.lengths(self.batch_size or 1).clone(), tuple(copies))

    def restore(self, kept: Kept) -> None:
        """Return to a kept place; this drops snapshots.

        Raises:
            InputError: the cache has been cut shorter since, or has other rows.
        """
        if not kept.lengths.any():
            self.reset()
            return
        before, reached = kept.lengths, self.lengths(self.batch_size or 1)
        if before.shape != reached.shape or bool((before.to(reached.device) > reached).any()):
            raise InputError(
                f"what was kept is of {before.tolist()} tokens and the cache holds "
                f"{reached.tolist()}; it can go back only to what it has held since"
            )
        for slot, content in zip(self.states, kept.contents, strict=True):
            if slot is not None:
                slot.reset()
                if content is not None:
                    everything = Segment(0, 0, 0, None, content[0].device)
                    slot.update(*content, everything)
        lengths = int(before[0]) if isinstance(self._lengths, int) else before.clone()
        for layer in self.layers:
            if layer is not None:
                layer.crop(lengths)
        self._lengths, self._longest, self._forward_unfinished = lengths, _longest(lengths), False

    def seek(self, position: Tensor) -> None:
        """Continue every row at slot `position` (a scalar), dropping later tokens.

        Raises:
            InputError: a row does not reach that far.
        """
        start = int(position)
        if start < 0 or not _are_all(self._lengths >= start):
            raise InputError(
                f"cache_position starts at {start}, but the cache holds {self.get_seq_length()} "
                "tokens; a forward continues where the cache ends, or from before that"
            )
        self.crop(start)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (N,), in that order."""
        if isinstance(self._lengths, Tensor):
            self._lengths = self._lengths[indices.to(self._lengths.device)]
            self._longest = _longest(self._lengths)
        for slot in self._slots():
            slot.select(indices)
        if self.adapters is not None and len(self.adapters) > 1:
            self.adapters = tuple(self.adapters[row] for row in indices.tolist())
        if self.companion is not None:
            self.companion.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the content of row `beam_idx[i]`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        if self.batch_size is not None:
            rows = torch.arange(self.batch_size, dtype=torch.long, device="cpu")
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty the cache; preallocated memory stays."""
        self._lengths, self._longest, self._forward_unfinished = 0, 0, False
        self.companion = self.adapters = None
        for slot in self._slots():
            slot.reset()

    def _slots(self) -> Iterator[AttentionSlot | StateSlot]:
        # Recurrent ones first: they may refuse, and then nothing has changed.
        for slot in (*self.states, *self.layers):
            if slot is not None:
                yield slot

    def _attention(self, layer_idx: int) -> AttentionSlot:
        slot = self.layers[layer_idx]
        if slot is None:
            raise InputError(f"layer {layer_idx} keeps a recurrent state, not keys and values")
        return slot


def check_adapters(*made_with: Hashable) -> None:
    """Check that all known adapters agree; None means unknown.

    Raises:
        InputError: it is not.
    """
    if len({one for one in made_with if one is not None}) > 1:
        raise _other_adapters()


def _other_adapters() -> InputError:
    return InputError(
        "the cache was filled with other adapters than those in use: what it holds is not what "
        "they would have made. Run the text again without it, or use the adapters that it was "
        "made with"
    )


def _are_all(found: bool | Tensor) -> bool:
    return found if isinstance(found, bool) else bool(found.all())


def _longest(lengths: int | Tensor) -> int:
    if isinstance(lengths, int):
        return lengths
    return int(lengths.max()) if len(lengths) else 0
