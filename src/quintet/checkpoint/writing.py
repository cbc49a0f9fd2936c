"""Writes named tensors as safetensors files, atomically."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import torch

from quintet.checkpoint import disk
from quintet.checkpoint.commit import Staged, clean_up, put_in_place
from quintet.checkpoint.header import DTYPES, encode_header
from quintet.checkpoint.layout import (
    FINAL_INDEX,
    REPLACED,
    SAVE_ID,
    STAGING,
    UNDO,
    Names,
    is_plain,
)
from quintet.checkpoint.reading import half_moved
from quintet.checkpoint.sizes import parse_size, split
from quintet.errors import InputError, SaveError, listed, shown
from quintet.files import locked
from quintet.folder import checked_path

_NO_TEXTS: Mapping[str, str] = MappingProxyType({})


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    text_files: Mapping[str, str] = _NO_TEXTS,
    variant: str | None = None,
    stem: str = "model",
    data: Callable[[str], torch.Tensor] | None = None,
) -> list[Path]:
    """Write a checkpoint in the hub's layout; return the paths of its files.

    An older checkpoint there is replaced in one step: whatever happens meanwhile, the directory
    holds the old one, the new one, or something that `Checkpoint.open` refuses. Other files are
    left alone. While it runs, both are on the disk. Of two saves at once, one waits for the other.

    With `data`, tensors are without memory, and it gives what is in one when that is written.

    Raises:
        InputError: an argument cannot be saved; nothing was touched.
        SaveError: writing failed, or another process has been saving there for ten minutes; what
            was there before is untouched.
    """
    most = parse_size(max_shard_size)
    header = {"format": "pt", **(metadata or {})}
    named = Names(variant, stem)
    if data is None:
        _check_tensors(tensors)
    _check_texts(header, text_files, named)
    parts = split({name: tensor.nbytes for name, tensor in tensors.items()}, most)

    def weights() -> Iterator[Mapping[str, torch.Tensor]]:
        for part in parts:
            yield {name: tensors[name] for name in part}

    needed = sum(tensor.nbytes for tensor in tensors.values())
    sharded = len(parts) > 1
    return _save(Path(directory), weights(), sharded, header, text_files, named, needed, data)


def save_stream(
    directory: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_size: int | str = "5GB",
    text_files: Mapping[str, str] = _NO_TEXTS,
) -> list[Path]:
    """Write a checkpoint from tensors generated one by one; see `save`.

    No more than the tensors of one file are there at a time. An error of whoever makes them
    leaves what was there before untouched.

    Raises:
        InputError: a tensor cannot be saved, or has the name of one before it.
        SaveError: writing failed; what was there before is untouched.
    """
    most = parse_size(max_shard_size)
    header = {"format": "pt"}
    named = Names()
    _check_texts(header, text_files, named)
    return _save(Path(directory), _filled(tensors, most), None, header, text_files, named, None)


def _filled(
    tensors: Iterable[tuple[str, torch.Tensor]], most: int
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Collect tensors until they fill a file."""
    part: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    room = most
    for name, tensor in tensors:
        if name in seen:
            raise InputError(f"tensor {shown(name)} is there twice")
        seen.add(name)
        if part and tensor.nbytes > room:
            _check_tensors(part)
            yield part
            part, room = {}, most
        part[name] = tensor
        room -= tensor.nbytes
    _check_tensors(part)
    yield part


def _save(
    directory: Path,
    parts: Iterator[Mapping[str, torch.Tensor]],
    sharded: bool | None,
    header: Mapping[str, str],
    texts: Mapping[str, str],
    named: Names,
    needed: int | None,
    data: Callable[[str], torch.Tensor] | None = None,
) -> list[Path]:
    checked_path(directory, "save_directory")
    if os.path.lexists(directory) and not directory.is_dir():
        raise SaveError(f"{directory} is a file; a checkpoint is written into a directory")
    staging = directory / f"{STAGING}{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            clean_up(directory)
            try:
                disk.make(staging)
                return put_in_place(_stage(staging, parts, sharded, header, texts, named, data))
            finally:
                # The note in it is needed if the text files could not be restored.
                if half_moved(staging) is None:
                    disk.discard(staging)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(_why(error, staging, needed)) from error


def _stage(
    staging: Path,
    parts: Iterator[Mapping[str, torch.Tensor]],
    sharded: bool | None,
    header: Mapping[str, str],
    texts: Mapping[str, str],
    named: Names,
    data: Callable[[str], torch.Tensor] | None,
) -> Staged:
    """Write all files into the temporary directory, under their temporary names.

    `sharded` is None if only the end of the parts tells whether there are several.
    """
    save_id = secrets.token_hex(8)
    header = header if sharded is False else {**header, SAVE_ID: save_id}
    written: list[str] = []
    names_of_shards: list[list[str]] = []
    total = 0
    for part in parts:
        written.append(f"{len(written)}.safetensors")
        names_of_shards.append(list(part))
        total += sum(tensor.nbytes for tensor in part.values())
        # The widest numbers first, so that each lies where a machine reads it best.
        ordered = sorted(part, key=lambda name: (-part[name].dtype.itemsize, name))
        encoded = _encode({name: part[name] for name in ordered}, header, data)
        disk.write(staging / written[-1], encoded)
    finals = [named.single]
    if len(written) > 1:
        finals = [named.shard(number + 1, len(written)) for number in range(len(written))]
    names = finals
    if len(written) > 1 and any(os.path.lexists(staging.parent / name) for name in finals):
        names = [f"{name.removesuffix('.safetensors')}.{save_id}.safetensors" for name in finals]
    for before, name in zip(written, names, strict=True):
        disk.move(staging / before, staging / name)
    if len(written) > 1:
        about = {SAVE_ID: save_id, "total_size": total}
        for file, shards in ((named.index, names), (FINAL_INDEX, finals)):
            where = {
                name: s for s, part in zip(shards, names_of_shards, strict=True) for name in part
            }
            index = {"metadata": about, "weight_map": dict(sorted(where.items()))}
            disk.write(staging / file, [f"{json.dumps(index, indent=2)}\n".encode()])
    for name, text in texts.items():
        disk.write(staging / name, [text.encode()])
    disk.sync(staging)
    return Staged(staging, dict(zip(names, finals, strict=True)), texts, named)


def _encode(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    data: Callable[[str], torch.Tensor] | None,
) -> Iterator[bytes | memoryview]:
    yield encode_header(tensors.items(), metadata)
    # One at a time: only that one is copied if it is on a device or not contiguous.
    for name, found in tensors.items():
        tensor = found if data is None else data(name)
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().data


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse unsupported dtypes, and memory shared by two names."""
    spans: dict[torch.device, list[tuple[int, int, bool, str]]] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"tensors has to map names to tensors, not {shown(name)} to {tensor}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "meta, without data" if tensor.is_meta else f"{tensor.layout}"
            raise InputError(f"tensor {shown(name)} is {kind}; only dense data can be saved")
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"tensor {shown(name)} has dtype {tensor.dtype}, unknown to the files")
        if name == "__metadata__" or not _is_utf8(name):
            raise InputError(f"{shown(name)} cannot be the name of a tensor")
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            span = (start, start + extent * tensor.dtype.itemsize, extent == tensor.numel(), name)
            spans.setdefault(tensor.device, []).append(span)
    pairs = [
        f"{shown(name)} and {shown(before)}"
        for group in map(sorted, spans.values())
        for (start, end, dense, before), (begin, _, _, name) in pairwise(group)
        # Interleaved views, as of columns, share a span and no element.
        if begin == start or (dense and begin < end)
    ]
    if pairs:
        raise InputError(
            f"tensors that share memory would be written twice and be untied:\n{listed(pairs)}\n"
            "Leave out all names but one"
        )


def _check_texts(header: Mapping[str, str], texts: Mapping[str, str], named: Names) -> None:
    if header["format"] != "pt" or SAVE_ID in header:
        raise InputError(f"metadata={shown(header)}: 'format' is 'pt' and {SAVE_ID!r} is reserved")
    for key, value in header.items():
        if not isinstance(key, str) or not isinstance(value, str) or not _is_utf8(key + value):
            raise InputError(f"metadata={shown({key: value})} has to map text to text")
    reserved = (named.single, named.index, FINAL_INDEX, REPLACED, UNDO, f"{UNDO}.part")
    for name, text in texts.items():
        if not is_plain(name) or name in reserved or name.endswith(".safetensors"):
            raise InputError(f"text_files: {shown(name)} has to be the plain name of a text file")
        if not isinstance(text, str) or not _is_utf8(text):
            raise InputError(f"text_files: the content of {shown(name)} has to be text")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why(error: OSError, staging: Path, needed: int | None) -> str:
    directory = staging.parent
    where = error.filename2 or error.filename or directory
    reason = f"could not save into {directory}: {error.strerror or error} ({where})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = "more" if needed is None else f"{needed:,}"
        reason += f"; the new weights need {size} bytes"
        with suppress(OSError):
            reason += f" beside what is there, and {shutil.disk_usage(directory).free:,} are free"
    if half_moved(staging) is not None:
        return f"{reason}; the old text files could not be put back, the next save does it"
    return f"{reason}; what was there before is untouched"
