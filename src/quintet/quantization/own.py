"""Detects the format of a matrix in our own files by its tensors."""

from collections.abc import Mapping

import torch

from quintet.checkpoint import TensorInfo
from quintet.errors import InputError
from quintet.ops.groups import group_size
from quintet.quantization.formats import (
    GroupFormat,
    Int4Format,
    Int8Format,
    Shape,
    WeightFormat,
)
from quintet.quantization.ordered import ORDER, OrderedFormat

BITS = {torch.int8: 8, torch.uint8: 4}


def integers_of(
    weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
) -> WeightFormat | None:
    """Return the integer format of a matrix in a file; None for plain numbers.

    Where its tensors fit no format, it is one that says which ones there should be.
    """
    found = tensors.get(weight)
    bits = None if found is None else BITS.get(found.dtype)
    if bits is None:
        return None
    weight_format = _in_order(weight, shape, tensors, bits)
    return OrderedFormat(weight_format) if weight + ORDER in tensors else weight_format


def _in_order(
    weight: str, shape: Shape, tensors: Mapping[str, TensorInfo], bits: int
) -> WeightFormat:
    iq4 = bits == 4 and f"{weight}_scale_iq4" in tensors
    scale = tensors.get(f"{weight}_scale_iq4" if iq4 else f"{weight}_scale")
    if scale is None or len(scale.shape) != len(shape) or not scale.dtype.is_floating_point:
        return Int8Format() if bits == 8 else Int4Format()
    offset = not iq4 and f"{weight}_offset" in tensors
    count = scale.shape[-1]
    try:
        group = None if count == 1 else group_size(shape[-1], count)
        group_format = GroupFormat(bits, group, offset, scale.dtype, iq4)
        return (
            Int4Format() if group_format.parts(shape) == Int4Format().parts(shape) else group_format
        )
    except InputError:
        return GroupFormat(bits, None, offset, scale.dtype, iq4)
