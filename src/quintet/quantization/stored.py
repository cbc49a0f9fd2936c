"""Matrices between a checkpoint's files and a model."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.checkpoint import StackExperts, TensorInfo, Weights, pieces
from quintet.quantization.apply import EncodedWeight, part_state
from quintet.quantization.config import QuantizationConfig
from quintet.quantization.formats import Shape, WeightFormat


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint, or the tensors of a quantised matrix.

    Attributes:
        name: of the tensor, or of the one that carries most of the matrix's bytes.
        format: None for plain numbers.
        files: name and shape of each tensor, by the format's keys.
    """

    name: str
    shape: Shape
    format: WeightFormat | None
    files: Mapping[str, tuple[str, Shape]]


def stored(
    wanted: Mapping[str, Shape],
    tensors: Mapping[str, TensorInfo],
    config: QuantizationConfig | None,
) -> dict[str, Stored]:
    """Find the tensors of a checkpoint that hold each tensor in `wanted`."""
    result = {}
    # What has a place of its own, such as a bias, is no part of a matrix.
    others = {name: info for name, info in tensors.items() if len(wanted.get(name, ())) != 1}
    for name, shape in wanted.items():
        weight_format = None
        if config is not None and len(shape) in (2, 3):
            weight_format = config.stored(name, shape, others)
        files = {"": (name, shape)}
        if weight_format is not None:
            files = {
                key: (file, _any_size(file, expected, tensors))
                for key, (file, expected) in weight_format.files(name, shape).items()
            }
        result[name] = Stored(name, shape, weight_format, files)
    return result


def read(
    weights: Weights, wanted: Mapping[str, Stored]
) -> Iterator[tuple[str, Tensor | EncodedWeight]]:
    """Read tensors; quantised ones with all their parts.

    Scales are taken first, as views of the mapped files, so that no weight has to wait for its own.
    """
    others = {
        file: (name, key)
        for name, one in wanted.items()
        for key, (file, _) in one.files.items()
        if key
    }
    found: dict[str, dict[str, Tensor]] = {}
    for file, tensor in weights.read(others) if others else ():
        name, key = others[file]
        found.setdefault(name, {})[key] = tensor
    carried = {one.files[""][0]: name for name, one in wanted.items()}
    for file, tensor in weights.read(carried):
        name = carried[file]
        one = wanted[name]
        if one.format is None:
            yield name, tensor
        else:
            parts = one.format.unpack(name, {"": tensor, **found.pop(name, {})}, one.shape)
            yield name, EncodedWeight(one.format, parts, one.shape)


def packed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    stacks: Sequence[StackExperts],
    *,
    tied: Container[str],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into plain tensors, and quantised matrices as on disk.

    Args:
        tied: names of tensors that are others under a second name; they are left out.
        dtype: what the model computes in.
    """
    plain, parted = part_state(model, tensors, tied)
    files: dict[str, Tensor] = {}
    for weight, (module, name, parts) in parted.items():
        (rows, *rest), stack = module.matrices[name]
        if not stack:
            files |= module.formats[name].pack(weight, parts, (rows, *rest), dtype)
            continue
        E, P = stack
        for piece in pieces(weight, (E, P * rows, *rest), stacks):
            assert piece.place is not None
            expert, height = piece.place
            place = (expert, height.start // rows)
            own = module.view(name, parts, place)
            files |= module.formats[name].pack(piece.name, own, (rows, *rest), dtype)
    return plain, files


def _any_size(name: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> Shape:
    return tensors[name].shape if shape == (-1,) and name in tensors else shape
