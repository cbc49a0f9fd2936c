"""Reads a directory of safetensors files; all headers are checked first."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self
from weakref import WeakValueDictionary

import torch

from quintet.checkpoint.expert_stacks import taken_apart
from quintet.checkpoint.header import MAX_TENSORS, Header, TensorInfo, parse_object, read_header
from quintet.checkpoint.layout import (
    INDEX,
    REPLACED,
    SAVE_ID,
    STAGING,
    UNDO,
    Names,
    is_last_step,
    is_plain,
)
from quintet.checkpoint.mapping import MappedFile
from quintet.errors import CheckpointError, listed, shown
from quintet.files import MAX_LISTING_BYTES, read_json, read_limited
from quintet.folder import find_file as find

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AGAIN = "fetch the checkpoint again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint by name, read on demand.

    Like Transformers, it takes `model.safetensors` where there is one, and otherwise the
    shards that `model.safetensors.index.json` names. Pickled weights are never read. Files that
    are replaced after `open` are read as they were.
    """

    directory: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _stamps: Mapping[Path, tuple[int, int, int]] = field(repr=False)
    # Until all of a file has been read, it is held: a save may remove it meanwhile.
    _maps: dict[Path, MappedFile] = field(repr=False, compare=False)
    _mapped: WeakValueDictionary[Path, MappedFile] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        stem: str = "model",
    ) -> Self:
        """Find the weights in a directory and check all names, shapes and sizes.

        Args:
            directory: where they are.
            variant: which, where there are several: "fp16" is model.fp16.safetensors.
            stem: what the files' names begin with.

        Raises:
            CheckpointError: no weights, or they are incomplete, damaged, unsafe or mixed.
            InputError: `variant` cannot be a part of a file's name.
        """
        directory = Path(directory)
        named = Names(variant, stem)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; a checkpoint is one")
        for staging in sorted(directory.glob(f"{STAGING}*")):
            if half_moved(staging) is not None:
                raise CheckpointError(
                    f"{directory} holds half of a save that was interrupted (see {staging}): its "
                    "config.json may be newer than its weights; save again, or remove "
                    f"{staging.name} if you know that the files belong together"
                )
        if single := find(directory, named.single):
            stamps = {single: _stamp(single)}
            headers = [read_header(single)]
        elif index := find(directory, named.index):
            weight_map, save_id = _read_index(index)
            shards = _find_shards(directory, index, weight_map)
            stamps = {path: _stamp(path) for path in shards.values()}
            headers = [read_header(path) for path in shards.values()]
            _check_shards(index, weight_map, dict(zip(shards, headers, strict=True)), save_id)
        else:
            raise CheckpointError(_why_nothing(directory, named))
        mapped = {path: _map(path, stamp) for path, stamp in stamps.items()}
        tensors = taken_apart(
            {name: info for header in headers for name, info in header.tensors.items()}
        )
        common = set.intersection(*(set(header.metadata.items()) for header in headers))
        metadata = MappingProxyType(dict(sorted(common)))
        return cls(directory, MappingProxyType(tensors), metadata, stamps, mapped)

    @classmethod
    def of_files(
        cls,
        directory: Path,
        tensors: Mapping[str, TensorInfo],
        stamps: Mapping[Path, tuple[int, int, int]],
    ) -> Self:
        """Build from files whose headers were read when their stamps were `stamps`.

        Raises:
            CheckpointError: a file is another one by now.
        """
        mapped = {path: _map(path, stamp) for path, stamp in stamps.items()}
        return cls(directory, MappingProxyType(dict(tensors)), {}, stamps, mapped)

    @property
    def mapped(self) -> bool:
        """True: tensors are views of the files."""
        return True

    @property
    def total_bytes(self) -> int:
        """The bytes of the data of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read each tensor once, in file order.

        They are private views of the mapped file: nothing is copied, and only what is looked at
        comes into memory. `forget` gives that back.

        Raises:
            CheckpointError: no such tensor, or a file was overwritten after `open`.
        """
        wanted = set(names)
        if unknown := sorted(map(shown, wanted - self.tensors.keys())):
            raise CheckpointError(f"{self.directory} has no tensor\n{listed(unknown)}")
        by_file: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            if name in wanted:
                by_file.setdefault(info.file, []).append(name)
        return self._stream(by_file)

    def forget(self, name: str) -> None:
        """Release the pages of a tensor, once its values are elsewhere.

        Its view can still be read. What was written to it is lost.
        """
        info = self.tensors[name]
        if (mapped := self._mapped.get(info.file)) is not None:
            mapped.forget(info)

    def _stream(self, by_file: dict[Path, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
        counts = Counter(info.file for info in self.tensors.values())
        for file, names in by_file.items():
            mapped = self._maps.get(file) or _map(file, self._stamps[file])
            _check_not_overwritten(file, self._stamps[file])
            self._mapped[file] = mapped
            for name in names:
                yield name, mapped.tensor(self.tensors[name])
            if len(names) == counts[file]:
                self._maps.pop(file, None)


def _map(file: Path, stamp: tuple[int, int, int]) -> MappedFile:
    try:
        mapped = MappedFile(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_AGAIN}") from error
    # After opening: what is mapped now is what was checked.
    if _stamp(file) != stamp:
        raise CheckpointError(f"{file} was changed after the checkpoint was opened; open it again")
    return mapped


def _check_not_overwritten(file: Path, stamp: tuple[int, int, int]) -> None:
    """Refuse a file that was overwritten in place since it was opened."""
    with suppress(OSError):
        found = file.stat()
        if found.st_ino == stamp[0] and (found.st_size, found.st_mtime_ns) != stamp[1:]:
            raise CheckpointError(
                f"{file} was changed after the checkpoint was opened; open it again"
            )


def half_moved(staging: Path) -> dict[str, str | None] | None:
    """Return the old text files of a half-done save, or None.

    A file that did not exist is None; bytes that are no UTF-8 are lone surrogates.
    """
    try:
        note = read_json(staging / UNDO, MAX_LISTING_BYTES)
        last_step, texts = note["last_step"], note["texts"]
    except (CheckpointError, OSError, KeyError, TypeError):
        return None
    # The note may have come with a directory that someone else made.
    if not isinstance(texts, dict) or not is_last_step(last_step):
        return None
    if not all(is_plain(name) and isinstance(text, str | None) for name, text in texts.items()):
        return None
    done = os.path.lexists(staging / last_step) == (last_step == REPLACED)
    return None if done else texts


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _why_nothing(directory: Path, named: Names) -> str:
    names = sorted(path.name for path in directory.iterdir())
    message = f"{directory} has neither {named.single} nor {named.index}"
    if pickles := [name for name in names if Path(name).suffix in _PICKLES]:
        return (
            f"{message}, only pickled weights, which are never read because they can run code:\n"
            f"{listed(pickles)}\nConvert them to safetensors with the tool that wrote them "
            "(save_pretrained of a recent version does), or take a revision that has them"
        )
    others = [name for name in names if name.endswith((".safetensors", INDEX, ".gguf"))]
    others += [name for name in names if re.fullmatch(r"model\.safetensors\.index\..+\.json", name)]
    if others:
        return f"{message}; other weights there (see `variant`) are\n{listed(others)}"
    return f"{message}; name a directory that holds weights, or {_AGAIN}"


def _read_index(path: Path) -> tuple[dict[str, str], str | None]:
    try:
        content = parse_object(read_limited(path, MAX_LISTING_BYTES), str(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} needs a weight_map from tensors to files, not {shown(weight_map)}; {_AGAIN}"
        )
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{path} names {len(weight_map)} tensors; the most is {MAX_TENSORS}")
    # One tensor of each file, as there may be a million.
    for shard, name in {str(shard): name for name, shard in weight_map.items()}.items():
        if not isinstance(weight_map[name], str) or not is_plain(shard):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is said to be in {shown(shard)}, which has to be "
                "the plain name of a file in the same directory"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is said to be in {shown(shard)}; "
                "only .safetensors files are read"
            )
    metadata = content.get("metadata", {})
    save_id = metadata.get(SAVE_ID) if isinstance(metadata, dict) else metadata
    if not isinstance(save_id, str | None):
        raise CheckpointError(f"{path} has metadata that is not usable: {shown(metadata)}")
    return weight_map, save_id


def _find_shards(directory: Path, index: Path, weight_map: dict[str, str]) -> dict[str, Path]:
    counts = Counter(weight_map.values())
    found = {shard: find(directory, shard) for shard in sorted(counts)}
    if missing := [shard for shard, path in found.items() if path is None]:
        lines = [f"{shard} ({_count(counts[shard], 'tensor')})" for shard in missing]
        raise CheckpointError(
            f"{index} names {_count(len(found), 'shard')}, of which {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing:\n{listed(lines)}\n"
            f"Fetch them into {directory}"
        )
    return {shard: path for shard, path in found.items() if path is not None}


def _check_shards(
    index: Path, weight_map: dict[str, str], headers: dict[str, Header], save_id: str | None
) -> None:
    """Compare the shards' content with their index."""
    ids = {shard: header.metadata.get(SAVE_ID) for shard, header in headers.items()}
    # Without one in the index, a shard without is another writer's and says nothing.
    known = {found for found in ids.values() if found is not None or save_id is not None}
    if len(known | ({save_id} if save_id is not None else set())) > 1:
        lines = [f"{shard}: {shown(found)}" for shard, found in ids.items()]
        raise CheckpointError(
            f"{index} and its shards are of different saves ({SAVE_ID} in the index is "
            f"{shown(save_id)}):\n{listed(lines)}\nTheir tensors may not belong together; {_AGAIN} "
            f"or save it again, or take {SAVE_ID} out of the index if the mix is meant"
        )
    where = [(name, shard) for shard, header in headers.items() for name in header.tensors]
    if lacking := [
        f"{shown(name)} in {shard}"
        for name, shard in weight_map.items()
        if name not in headers[shard].tensors
    ]:
        raise CheckpointError(
            f"{index} names {_count(len(lacking), 'tensor')} that the shards lack:\n"
            f"{listed(lacking)}\nThe shards are of another checkpoint; {_AGAIN}"
        )
    if extra := [
        f"{shown(name)} in {shard}"
        + (f", but also in {weight_map[name]}" if name in weight_map else "")
        for name, shard in where
        if weight_map.get(name) != shard
    ]:
        raise CheckpointError(
            f"the shards of {index} hold {_count(len(extra), 'tensor')} that the index does not "
            f"name there:\n{listed(extra)}\nThe shards are of another checkpoint; {_AGAIN}"
        )
