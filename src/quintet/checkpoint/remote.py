"""The tensors of a checkpoint from its headers alone, also on the hub."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quintet.checkpoint.header import DTYPES, TensorInfo
from quintet.checkpoint.layout import INDEX, SINGLE
from quintet.checkpoint.opening import open_weights
from quintet.errors import CheckpointError, OfflineError, shown
from quintet.files import MAX_LISTING_BYTES, read_json
from quintet.folder import find_file as find
from quintet.hub import locate, locate_weights


@dataclass(frozen=True, slots=True)
class Headers:
    """The sizes and dtypes in the headers of the files.

    Attributes:
        total_bytes: of the data of all tensors.
        files: how many files there are.
        dtypes: how many tensors of each dtype, or type of blocks; of the first file alone where
            there are many.
        local: whether the files are on this machine.
        tensors: the entries of all tensors, where they are.
    """

    total_bytes: int
    files: int
    dtypes: Mapping[str, int]
    local: bool
    tensors: Mapping[str, TensorInfo] | None = None


def read_headers(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    gguf_file: str | None = None,
) -> Headers:
    """Read the headers of a model's weights; of files on the hub, nothing else.

    Raises:
        ModelNotFoundError: no such model.
        OfflineError: it is not here, and the network is off.
        CheckpointError: it has no weights in this format, or they are damaged.
    """
    try:
        root = locate_weights(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=True,
            subfolder=subfolder,
            gguf_file=gguf_file,
        )
        checkpoint = open_weights(root)
    except (OfflineError, CheckpointError):
        if local_files_only or Path(name_or_path).expanduser().exists():
            raise
    else:
        infos = checkpoint.tensors.values()
        counts = Counter(_kind(info) for info in infos)
        files = len({info.file for info in infos})
        return Headers(checkpoint.total_bytes, files, counts, True, checkpoint.tensors)
    root = locate(
        name_or_path,
        (INDEX,),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        subfolder=subfolder,
    )
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    index = find(root, INDEX)
    if index is None:
        size, counts = _remote(os.fspath(name_or_path), prefix + SINGLE, revision, token)
        return Headers(size, 1, counts, local=False)
    content = read_json(index, MAX_LISTING_BYTES)
    shards = sorted({str(shard) for shard in content.get("weight_map", {}).values()})
    total = content.get("metadata", {}).get("total_size")
    if not shards or not isinstance(total, int):
        raise CheckpointError(f"{index} does not say which files there are and their total_size")
    _, counts = _remote(os.fspath(name_or_path), prefix + shards[0], revision, token)
    return Headers(total, len(shards), counts, local=False)


def _kind(info: TensorInfo) -> str:
    return _name(info.dtype) if info.blocks is None else info.blocks.name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remote(
    repository: str, file: str, revision: str | None, token: str | bool | None
) -> tuple[int, Counter[str]]:
    """Fetch the header of one file from the hub; return its data size and its tensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    try:
        found = HfApi(token=token).parse_safetensors_file_metadata(
            repository, file, revision=revision
        )
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{repository} has neither {SINGLE} nor {INDEX}; pickled weights are never read"
        ) from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{repository}: {file} is damaged ({error})") from error
    counts: Counter[str] = Counter()
    size = 0
    for name, tensor in found.tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{repository}: {name} has the unknown dtype {shown(tensor.dtype)}"
            )
        counts[_name(DTYPES[tensor.dtype])] += 1
        size += tensor.data_offsets[1] - tensor.data_offsets[0]
    return size, counts
