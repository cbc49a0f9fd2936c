"""Safetensors headers: parsed and validated without trusting their content.

A file is an unsigned 64-bit length, a JSON object of that many bytes, and the data:
`{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {…}}`.
The library parses it too; doing it here lets an error name file, tensor and bytes.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from quintet.errors import CheckpointError, shown
from quintet.gguf.types import BlockType

# The limit of the hub itself; the header of 100 000 tensors is about 12 MB.
MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 1_000_000
MAX_CONTAINERS = 2_000_000
# As many axes as torch's own operations take.
MAX_AXES = 64

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The entry of a tensor in the header of its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int = 0
    """The offset of its data in the file."""
    blocks: BlockType | None = None
    """The block of neighbouring weights of a row that share bytes; None if each has its own."""

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        if self.blocks is not None:
            return math.prod(self.shape) // self.blocks.weights * self.blocks.nbytes
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in data order, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; its data is not touched.

    Raises:
        CheckpointError: the file is truncated or damaged, or not in this format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                _damaged(path, f"is {size} bytes long, which is too short for any header")
            if start == b"version ":
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there"
                )
            length = int.from_bytes(start, "little")
            if length > size - 8:
                _damaged(path, f"announces a header of {length} bytes but has {size} in all")
            if length > MAX_HEADER_BYTES:
                _damaged(path, f"has a header of {length} bytes; the most is {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not raw.startswith(b"{"):
        _damaged(path, "has a header that does not begin with '{'")
    content = parse_object(raw, f"the header of {path}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _damaged(path, f"has __metadata__ that does not map text to text: {shown(metadata)}")
    return Header(_tensors(path, content, 8 + length, size), metadata)


def parse_object(raw: bytes, description: str) -> dict[str, Any]:
    """Read a JSON object in which every key is there once; `description` names it in messages.

    Raises:
        CheckpointError: it is not UTF-8, not JSON, not an object, or a key is there twice.
    """
    objects = 0

    # Each takes some sixty bytes, however few it has in the file.
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise CheckpointError(f"{description} has more than {MAX_CONTAINERS} lists and objects")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 2:
            raise ValueError(f"more than {MAX_TENSORS} objects")
        result = dict(pairs)
        if len(result) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{shown(twice)} is there twice")
        return result

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{description} is not readable as JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{description} has to be a JSON object, not {shown(value)}")
    return value


def encode_header(
    tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> bytes:
    """Return the length and header of a file that holds `tensors` in this order."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.dtype.itemsize
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    # Readers map the file: the data has to begin where eight-byte numbers may lie.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _damaged(path: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"{path} {fault}; the file is damaged or incomplete, fetch it again")


def _tensors(
    path: Path, content: dict[str, Any], data_start: int, size: int
) -> dict[str, TensorInfo]:
    data_bytes = size - data_start
    places = sorted((*_checked(path, name, entry), name) for name, entry in content.items())
    tensors: dict[str, TensorInfo] = {}
    reached = 0
    for begin, end, name in places:
        if begin != reached:
            kind = "a gap after" if begin > reached else "an overlap with"
            _damaged(
                path,
                f"has {kind} byte {reached} of its data: tensor {shown(name)} begins at {begin}",
            )
        if end > data_bytes:
            needed = max(end for _, end, _ in places)
            _damaged(
                path,
                f"is truncated: tensor {shown(name)} ends at byte {end} of the data, of which "
                f"there are {data_bytes}, {needed - data_bytes} too few",
            )
        entry = content[name]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + begin)
        reached = end
    if reached != data_bytes:
        _damaged(path, f"has {data_bytes} bytes of data, of which its tensors hold {reached}")
    return tensors


def _checked(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Return an entry's byte range, once dtype, shape and size agree."""
    tensor = f"has a tensor {shown(name)}"
    if not _is_text(name):
        _damaged(path, f"{tensor} whose name is not text")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _damaged(path, f"{tensor} without dtype, shape and data_offsets alone: {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path} {tensor} of dtype {shown(dtype)}; known are {', '.join(DTYPES)}"
        )
    if not _is_counts(shape) or len(shape) > MAX_AXES or _elements(shape) >= 2**63:
        _damaged(path, f"{tensor} of the impossible shape {shown(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(path, f"{tensor} with impossible data_offsets {shown(offsets)}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    found = offsets[1] - offsets[0]
    if needed != found:
        _damaged(path, f"{tensor} whose {dtype} of shape {shape} needs {needed} bytes, not {found}")
    return offsets[0], offsets[1]


def _elements(shape: list[int]) -> int:
    # An empty axis does not excuse the others: torch multiplies them one by one.
    return math.prod(size or 1 for size in shape)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
