"""Adapters in GGUF, under the names of PEFT: see `quintet.gguf.adapters`."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quintet.adapters.config import LoraConfig
from quintet.adapters.names import name_of
from quintet.checkpoint import Checkpoint, TensorInfo
from quintet.checkpoint.gguf import check_types, in_halves, info_of
from quintet.errors import CheckpointError, listed, shown
from quintet.gguf import WeightPart
from quintet.gguf.adapters import MODEL_TYPES, AdaptedMatrix, GGUFAdapter, read_gguf_adapter
from quintet.ops.blocks import decode_blocks

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GGUFAdapterWeights:
    """The tensors of an adapter's file by PEFT's names, read on demand."""

    tensors: Mapping[str, TensorInfo]
    _files: Checkpoint
    _changes: Mapping[str, Change]

    @property
    def mapped(self) -> bool:
        """False: some tensors are decoded, or reordered."""
        return False

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read each tensor once."""
        for name, tensor in self._files.read(names):
            kind = self._files.tensors[name].blocks
            if kind is not None:
                tensor = decode_blocks(tensor, kind, torch.float32)
            change = self._changes.get(name)
            yield name, tensor if change is None else change(tensor)

    def forget(self, name: str) -> None:
        """Release the pages of a tensor, once its values are elsewhere."""
        self._files.forget(name)


def open_gguf_adapter(
    path: Path, values: Mapping[str, Any] | None
) -> tuple[LoraConfig, GGUFAdapterWeights]:
    """Open an adapter in GGUF: what it is, and its tensors.

    Args:
        path: of the file.
        values: the config of the model that it is for; None to be told of it alone.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: it is damaged, no adapter, or of another model.
        UnsupportedModelError: an adapter of another kind.
    """
    adapter = read_gguf_adapter(path)
    check_types(adapter.file)
    if values is not None:
        _check_model(adapter, values)
    if adapter.norms:
        warnings.warn(
            f"{path} has {len(adapter.norms)} vectors of norms beside the adapter, which are left "
            f"out, as in llama.cpp:\n{listed(list(adapter.norms))}",
            stacklevel=5,
        )
    stored: dict[str, TensorInfo] = {}
    changes: dict[str, Change] = {}
    for matrix in adapter.matrices:
        for name, part in _parts(matrix):
            stored[name] = info_of(part)
        if matrix.embeds:
            changes[name_of(matrix.path, "lora_embedding_A")] = _transposed
        if matrix.paired and values is not None:
            changes[name_of(matrix.path, "lora_B.weight")] = partial(
                in_halves, heads=values[matrix.paired]
            )
    files = Checkpoint.of_files(path.parent, stored, adapter.file.files)
    tensors = {name: _changed_info(info, changes.get(name)) for name, info in stored.items()}
    return _config(adapter), GGUFAdapterWeights(tensors, files, changes)


def _check_model(adapter: GGUFAdapter, values: Mapping[str, Any]) -> None:
    path = adapter.file.path
    if values["model_type"] not in MODEL_TYPES[adapter.architecture]:
        raise CheckpointError(
            f"{path} is an adapter of the architecture {shown(adapter.architecture)}, and this "
            f"model is a {values['model_type']}"
        )
    E = values.get("num_experts") or values.get("n_routed_experts") or 0
    for matrix in adapter.matrices:
        if matrix.part and not matrix.a.shape[0] == matrix.b.shape[0] == E:
            raise CheckpointError(
                f"{path}: {matrix.a.name} has the shape {list(matrix.a.shape)} and "
                f"{matrix.b.name} {list(matrix.b.shape)}, and the model has {E} experts"
            )
        heads = values[matrix.paired] if matrix.paired else 1
        if matrix.paired and matrix.b.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{path}: {matrix.b.name} has the shape {list(matrix.b.shape)}, which is not "
                f"{heads} heads of pairs"
            )


def _parts(matrix: AdaptedMatrix) -> Iterator[tuple[str, WeightPart]]:
    leaves = ("lora_embedding_A", "lora_embedding_B") if matrix.embeds else _LEAVES
    for leaf, tensor in zip(leaves, (matrix.a, matrix.b), strict=True):
        if not matrix.part:
            name = name_of(matrix.path, leaf)
            yield name, WeightPart(name, tensor, tensor.shape, tensor.start)
            continue
        size = tensor.nbytes // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            name = name_of(f"{matrix.path}.{expert}.{matrix.part}", leaf)
            yield (
                name,
                WeightPart(name, tensor, tensor.shape[1:], tensor.start + expert * size),
            )


_LEAVES = ("lora_A.weight", "lora_B.weight")


def _changed_info(info: TensorInfo, change: Change | None) -> TensorInfo:
    """Return the info of a tensor once it is read."""
    if info.blocks is not None:
        info = replace(info, dtype=torch.float32, blocks=None)
    return replace(info, shape=info.shape[::-1]) if change is _transposed else info


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def _config(adapter: GGUFAdapter) -> LoraConfig:
    ranks = {matrix.path: matrix.rank for matrix in adapter.matrices}
    # Without an alpha, nothing is scaled, whatever the rank.
    alphas: dict[str, float] = {} if adapter.alpha else dict(ranks)
    return LoraConfig(
        r=max(ranks.values(), default=1),
        lora_alpha=adapter.alpha or 1,
        target_modules=sorted(m.path for m in adapter.matrices if not m.part),
        alpha_pattern=alphas,
        base_model_name_or_path=adapter.base,
    )
