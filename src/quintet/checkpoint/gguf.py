"""The weights of a GGUF file as named tensors of a release; see `quintet.gguf`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from quintet.checkpoint.header import TensorInfo
from quintet.checkpoint.reading import Checkpoint
from quintet.errors import CheckpointError, UnsupportedModelError, listed
from quintet.gguf import GGUFFile, WeightPart, config_values, read_gguf, release_parts
from quintet.gguf.layouts import LAYOUTS

_PLAIN: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
    }
)


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """The tensors of one or more GGUF files, read on demand.

    Attributes:
        tensors: by the names of a release; experts one by one. Shapes are those of the weights,
            also where the file has blocks of them.
    """

    tensors: Mapping[str, TensorInfo]
    _files: Checkpoint
    # Heads whose rows are in the order of pairs, by the names of their tensors.
    _paired: Mapping[str, int]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the head of a file, and check names, types and shapes of its tensors.

        Raises:
            CheckpointError: the file is damaged or incomplete, or has tensors without a place.
            UnsupportedModelError: its architecture, or a type of its tensors, is not here.
        """
        file = read_gguf(path)
        architecture = str(file.metadata["general.architecture"])
        values = config_values(file)
        check_types(file)
        parts = release_parts(file, architecture, values)
        tensors = {part.name: info_of(part) for part in parts}
        if len(tensors) < len(parts):
            counts = Counter(part.name for part in parts)
            twice = [name for name, count in counts.items() if count > 1]
            raise CheckpointError(f"{path} has these in two forms:\n{listed(twice)}")
        files = Checkpoint.of_files(path.parent, tensors, file.files)
        paired = {part.name: part.heads for part in parts if part.heads}
        if architecture == "llama":
            tensors |= _zero_biases(tensors, values)
        return cls(MappingProxyType(tensors), files, paired)

    @property
    def directory(self) -> Path:
        """The folder of the files."""
        return self._files.directory

    @property
    def mapped(self) -> bool:
        """False: some tensors are reordered when read."""
        return False

    @property
    def total_bytes(self) -> int:
        """The bytes of the data of all tensors."""
        return self._files.total_bytes

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read each tensor once, in file order; see `Checkpoint.read`.

        Blocks come as their bytes, (..., O, bytes a row).

        Raises:
            CheckpointError: no such tensor, or a file was overwritten after `open`.
        """
        wanted = dict.fromkeys(names)
        derived = [
            name for name in wanted if name in self.tensors.keys() - self._files.tensors.keys()
        ]
        for name in derived:
            yield name, torch.zeros(self.tensors[name].shape, dtype=torch.float32, device="cpu")
        for name, tensor in self._files.read(wanted.keys() - set(derived)):
            heads = self._paired.get(name)
            yield name, tensor if heads is None else in_halves(tensor, heads)

    def forget(self, name: str) -> None:
        """Release the pages of a tensor, once its values are elsewhere."""
        if name in self._files.tensors:
            self._files.forget(name)


def info_of(part: WeightPart) -> TensorInfo:
    """Return the entry of a tensor, or of rows of one."""
    kind = part.tensor.type
    dtype = _PLAIN.get(kind.name)
    return TensorInfo(
        part.name,
        torch.uint8 if dtype is None else dtype,
        part.shape,
        part.tensor.file,
        part.start,
        kind if dtype is None else None,
    )


def check_types(file: GGUFFile) -> None:
    """Check that all tensors can be decoded.

    Raises:
        UnsupportedModelError: one is of a type that is not read.
    """
    odd = [
        f"{tensor.name}: {tensor.type.name}"
        for tensor in file.tensors.values()
        if tensor.type.name not in (*LAYOUTS, *_PLAIN)
    ]
    if odd:
        raise UnsupportedModelError(
            f"{file.path} has {len(odd)} tensors of types that are not read here:\n{listed(odd, 3)}"
            f"\nThere are {', '.join((*_PLAIN, *LAYOUTS))}; take a file in one of these, such as "
            "Q4_K_M or Q8_0"
        )


def _zero_biases(
    tensors: Mapping[str, TensorInfo], values: Mapping[str, object]
) -> dict[str, TensorInfo]:
    """Return zeros for the biases that a Qwen2 has and a Llama has not."""
    biases = {}
    for name, info in tensors.items():
        bias = f"{name.removesuffix('weight')}bias"
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            biases[bias] = TensorInfo(bias, torch.float32, info.shape[:1], info.file)
    return {name: info for name, info in biases.items() if name not in tensors}


def in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from interleaved pairs to two halves."""
    pairs = torch.unflatten(tensor, 0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)
