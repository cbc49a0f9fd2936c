"""Integers with scale and offset per column group: the common form of other files.

A file that GPTQ, AWQ, compressed-tensors or MLX wrote is unpacked into `GroupedFormat`, which says
exactly the same. From there it becomes what a model holds: one of our formats where that is no
further rounding, or plain numbers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import CheckpointError, InputError, UnsupportedModelError
from quintet.ops.groups import group_count, pack_numbers
from quintet.ops.quantized import INT4_GROUP, bands, int4_shapes
from quintet.ops.words import unpack_words
from quintet.parallel.placement import Shard
from quintet.quantization.cutting import Grain, shards_by
from quintet.quantization.formats import (
    GroupFormat,
    Int4Format,
    Int8Format,
    Parts,
    Shape,
    TensorSpec,
    WeightFormat,
    require_finite,
)
from quintet.quantization.ordered import ORDER, OrderedFormat


def finite(scale: Tensor, weight: str) -> Tensor:
    """Return finite scales in float32, contiguous by row.

    Raises:
        CheckpointError: one is not finite.
    """
    require_finite(scale, weight)
    return scale.to(torch.float32).contiguous()


def numbers_in(words: Tensor, bits: int, weight: str) -> Tensor:
    """Unpack 32-bit words to unsigned numbers; see `unpack_words`.

    Raises:
        CheckpointError: they are no such words.
    """
    if words.dtype not in (torch.int32, torch.uint32):
        raise CheckpointError(
            f"{weight} is packed in {words.dtype}, and has to be in int32; fetch the file again"
        )
    return unpack_words(words, bits)


class FileFormat(WeightFormat):
    """A read-only format of files."""

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Raise: only other programs write such files."""
        raise UnsupportedModelError(
            f"{self.name} is read and not written; use quantize='int8' or 'int4'"
        )

    @property
    def model_format(self) -> WeightFormat | None:
        return None

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        return None


@dataclass(frozen=True)
class GroupedFormat(FileFormat):
    """w = q · scale + offset, with unsigned 4- or 8-bit q, per group.

    Attributes:
        bits: of the integers.
        group: columns of a group; None for one of all.
        symmetric: whether an offset is always the scale times -2 ** (bits - 1).
        ordered: whether an index says which group a column is of.
        dtype: of the scales.
    """

    name = "groups of integers"
    bits: int
    group: int | None
    symmetric: bool
    ordered: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def middle(self) -> int:
        """The integer that means zero in a symmetric format."""
        return int(2 ** (self.bits - 1))

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        groups = TensorSpec((*shape[:-1], group_count(shape[-1], self.group)), torch.float32)
        index = {"_index": TensorSpec(shape[-1:], torch.int64)} if self.ordered else {}
        return {"": TensorSpec(shape, torch.uint8), "_scale": groups, "_offset": groups, **index}

    def cuts(self, row: int) -> bool:
        return not self.ordered

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return the shard of each part for a shard of the matrix, or None."""
        # With an index, columns find their groups wherever they are.
        group = None if self.ordered else Grain(columns=self.group or max(shard.shape[-1], 1))
        if group is not None:
            return shards_by({"": Grain(), "_scale": group, "_offset": group}, shard)
        last = len(shard.shape) - 1
        rows = Shard(shard.shape, {d: r for d, r in shard.ranges.items() if d < last}, shard.zero)
        scales = shards_by({"_scale": Grain(columns=max(shard.shape[-1], 1))}, rows)
        assert scales is not None
        count = group_count(shard.shape[-1], self.group)
        scale = replace(scales["_scale"], shape=(*shard.shape[:-1], count))
        along = {0: shard.ranges[last]} if last in shard.ranges else {}
        index = Shard(shard.shape[-1:], along)
        return {"": shard, "_scale": scale, "_offset": scale, "_index": index}

    def meant(
        self, levels: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None, weight: str
    ) -> dict[str, Tensor]:
        """Return the parts of (levels - zero) · scale; zero defaults to the middle.

        Args:
            levels: uint8 (..., O, I).
            scale: (..., O, G).
            zero: integers (..., O, G).
            index: the group of each column (I,).
            weight: its name, for errors.
        """
        scale = finite(scale, weight)
        zero_point = -self.middle if zero is None else -zero.to(torch.float32).contiguous()
        parts = {"": levels, "_scale": scale, "_offset": scale * zero_point}
        if index is not None:
            index = _checked(index, scale.shape[-1], weight)
            self._check_groups(index, weight)
            parts |= {"_index": index} if self.ordered else {}
        return parts

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        levels, columns = parts[""], shape[-1]
        groups, index = parts["_scale"].shape[-1], parts.get("_index")
        if index is None:
            size = self.group or columns
            index = torch.arange(columns, device=levels.device, dtype=torch.long) // max(size, 1)
        scales, offsets = (parts[s].reshape(-1, groups) for s in ("_scale", "_offset"))
        decoded = torch.empty(levels.shape, dtype=dtype, device=levels.device)
        for rows, target, group_scale, more in zip(
            bands(levels.reshape(-1, columns)),
            bands(decoded.view(-1, columns)),
            bands(scales, columns),
            bands(offsets, columns),
            strict=True,
        ):
            numbers = rows.to(torch.float32).mul_(group_scale[:, index]).add_(more[:, index])
            target.copy_(numbers)
        return decoded

    @property
    def model_format(self) -> WeightFormat | None:
        inner = self._model_format_in_order
        return OrderedFormat(inner) if self.ordered and inner is not None else inner

    @property
    def _model_format_in_order(self) -> WeightFormat | None:
        if self.symmetric and self.bits == 4 and (self.group or INT4_GROUP) % INT4_GROUP == 0:
            return Int4Format()
        if self.symmetric and self.bits == 8 and self.group is None:
            return Int8Format()
        try:
            # The product of a scale and a zero point has more digits than either.
            dtype = self.dtype if self.symmetric else torch.float32
            return GroupFormat(self.bits, self.group, not self.symmetric, dtype)
        except InputError:
            return None

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        """Return the parts in another format if that is no rounding; None if it would be one.

        Scales become what that format has: bfloat16 in int4.
        """
        to = to.parts_of
        if self.model_format is None or to != self.model_format:
            return None
        levels, scale, offset = parts[""], parts["_scale"], parts["_offset"]
        if not isinstance(to, OrderedFormat):
            return self._recast(levels, scale, offset, to)
        order = parts["_index"].argsort(stable=True)
        sorted_parts = self._recast(levels.index_select(-1, order), scale, offset, to.inner)
        return {**sorted_parts, ORDER: order.to(torch.int32)}

    def _recast(
        self, levels: Tensor, scale: Tensor, offset: Tensor, to: WeightFormat
    ) -> dict[str, Tensor]:
        if isinstance(to, Int4Format):
            groups = int4_shapes(tuple(levels.shape))[1][-1]
            filled = F.pad(levels, (0, -levels.shape[-1] % INT4_GROUP), value=self.middle)
            repeats = groups if self.group is None else self.group // INT4_GROUP
            scales = scale.repeat_interleave(repeats, dim=-1)[..., :groups]
            return {"": pack_numbers(filled), "_scale": scales.to(torch.bfloat16)}
        if isinstance(to, Int8Format):
            return {"": _signed(levels), "_scale": scale.squeeze(-1)}
        assert isinstance(to, GroupFormat)
        numbers = _signed(levels) if self.bits == 8 else pack_numbers(levels)
        parts = {"": numbers, "_scale": scale.to(to.dtype)}
        if to.offset:
            # Integers of 8 bits have their zero in the middle.
            more = offset + scale * self.middle if self.bits == 8 else offset
            parts["_offset"] = more.to(to.dtype)
        return parts

    def _check_groups(self, index: Tensor, weight: str) -> None:
        size = self.group or max(index.numel(), 1)
        ascending = torch.arange(index.numel(), device=index.device, dtype=torch.long) // size
        if self.ordered and not torch.equal(index.sort().values, ascending):
            raise CheckpointError(
                f"{weight}: g_idx makes groups that are not of {size} inputs each; the file is "
                "damaged or its group_size another"
            )
        if not self.ordered and not torch.equal(index, ascending):
            raise CheckpointError(
                f"{weight}: g_idx gives columns to groups in an order of their own, and "
                "quantization_config says desc_act=false; the files are of another vintage: set "
                "desc_act to true in config.json, or fetch the model again"
            )


def _signed(levels: Tensor) -> Tensor:
    return (levels ^ 128).view(torch.int8)


def _checked(index: Tensor, groups: int, weight: str) -> Tensor:
    wide = index.to(torch.int64)
    if wide.numel() and not (int(wide.min()) >= 0 and int(wide.max()) < groups):
        raise CheckpointError(
            f"{weight}: g_idx goes from {int(wide.min())} to {int(wide.max())}, and there are "
            f"{groups} groups; the file is damaged or its group_size another"
        )
    return wide
