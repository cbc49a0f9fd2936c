"""The block layout of each GGUF type, and the equivalent of our formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The values shared by neighbouring weights; see `quintet.ops.blocks`.

    Attributes:
        halves: the bytes of a block at which numbers in half precision begin.
        bits: of a weight's number as we hold it, 4 or 8.
        group: how many neighbours share a scale.
        offset: whether they share an offset.
        table: whether numbers are places in the table of IQ4.
        two_levels: whether scales are numbers of a few bits, in multiples of those in halves.
    """

    halves: tuple[int, ...]
    bits: int
    group: int = 32
    offset: bool = False
    table: bool = False
    two_levels: bool = False


LAYOUTS: Mapping[str, TensorLayout] = MappingProxyType(
    {
        "Q4_0": TensorLayout((0,), 4),
        "Q4_1": TensorLayout((0, 2), 4, offset=True),
        "Q5_0": TensorLayout((0,), 8),
        "Q5_1": TensorLayout((0, 2), 8, offset=True),
        "Q8_0": TensorLayout((0,), 8),
        "Q2_K": TensorLayout((80, 82), 8, 16, offset=True, two_levels=True),
        "Q3_K": TensorLayout((108,), 8, 16, two_levels=True),
        "Q4_K": TensorLayout((0, 2), 4, offset=True, two_levels=True),
        "Q5_K": TensorLayout((0, 2), 8, offset=True, two_levels=True),
        "Q6_K": TensorLayout((208,), 8, 16, two_levels=True),
        "IQ4_NL": TensorLayout((0,), 4, table=True),
        "IQ4_XS": TensorLayout((0,), 4, table=True, two_levels=True),
    }
)
"""The types that are read, by their names."""
