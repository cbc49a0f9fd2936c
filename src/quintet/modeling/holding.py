"""A summary of how a checkpoint's tensors are stored in files and held by the model."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch

from quintet.checkpoint import TensorInfo
from quintet.modeling.key_mapping import KeyMapping
from quintet.quantization import Slot


def number_formats(
    mapping: KeyMapping,
    tensors: Mapping[str, TensorInfo],
    slots: Mapping[str, Slot],
    dtype_of: Callable[[str], torch.dtype],
) -> Counter[tuple[str, str]]:
    """Count tensors by storage format and the format the model holds them in.

    Args:
        slots: what takes in the tensors of a name that are held quantised.
        dtype_of: of the others.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for in_file, (name, _) in mapping.wanted.items():
        number_format = _format(slots[name]) if name in slots else _plain(dtype_of(name))
        for file, _ in mapping.stored[in_file].files.values():
            info = tensors[file]
            kind = _plain(info.dtype) if info.blocks is None else info.blocks.name
            counts[kind, number_format] += 1
    return counts


def in_words(counts: Counter[tuple[str, str]]) -> str:
    """Format the counts: "210 Q4_1 as int8, 1 Q8_0 as int8, 61 float32 as bfloat16"."""
    return ", ".join(
        f"{count:,} {kind}" + (f" as {number_format}" if number_format != kind else "")
        for (kind, number_format), count in counts.most_common()
    )


def _format(slot: Slot) -> str:
    return slot.module.formats[slot.name].name


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
