"""Identifies files that are not GGUF, for error messages."""

from pathlib import Path

from quintet.errors import CheckpointError

MAGIC = b"GGUF"
# Magic, version, two counts.
LEAST_BYTES = 24
_OLD = (b"lmgg", b"fmgg", b"tjgg", b"algg")


def refuse_other(path: Path, start: bytes, size: int) -> None:
    """Refuse a file whose first bytes are not those of a GGUF that can be read.

    Raises:
        CheckpointError: it is something else, which is named.
    """
    if fault := _foreign(start, size):
        raise CheckpointError(f"{path} {fault}")


def _foreign(start: bytes, size: int) -> str | None:
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model; run `git lfs pull` there"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a model; what was fetched is an error or a page about the file"
    if start[:4] in _OLD:
        return "is in the format before GGUF, of 2023; convert the original model with llama.cpp"
    if start[:2] == b"PK" or start[:2] == b"\x80\x02":
        return "is a pickle of PyTorch, which can run code and is never read"
    if not start.startswith(MAGIC):
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
            return "is safetensors, not GGUF; a model in safetensors is a directory of files"
        return f"does not begin with {MAGIC!r} and is no GGUF file, or is damaged"
    if size < LEAST_BYTES:
        return f"is {size} bytes long, too short for any GGUF; fetch it again"
    version = int.from_bytes(start[4:8], "little")
    if version >= 65536:
        return "is big-endian GGUF; only little-endian files can be read"
    if version == 1:
        return "is GGUF of version 1, of August 2023; 2 and 3 can be read: fetch a newer file"
    return None
