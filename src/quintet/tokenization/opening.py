"""Finds a tokenizer's files by name."""

import os
from collections.abc import Sequence

from quintet.errors import CheckpointError, InputError, TokenizerError, shown
from quintet.gguf import read_gguf
from quintet.hub import locate
from quintet.tokenization.files import TokenizerFiles, read_tokenizer_files
from quintet.tokenization.gguf import read_gguf_tokenizer


def open_files(
    name_or_path: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    gguf_file: str | os.PathLike[str] | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
    subfolder: str,
    force_download: bool,
) -> TokenizerFiles:
    """Return the tokenizer files of a directory, hub id or GGUF file.

    Raises:
        ModelNotFoundError: no such directory, repository or file, or no tokenizer in it.
        TokenizerError: its files are damaged or contradict each other.
        UnsupportedModelError: a GGUF file has a tokenizer that is not known.
        InputError: `force_download` of a GGUF file.
    """
    root = locate(
        name_or_path,
        patterns,
        gguf_file=gguf_file,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        subfolder=subfolder,
        force_download=force_download,
    )
    if not root.is_file():
        return read_tokenizer_files(root)
    if force_download:
        raise InputError(
            f"force_download=True fetches a tokenizer's small files again; {shown(str(root))} "
            "holds the whole model, and `quintet rm` removes it from the hub cache"
        )
    try:
        return read_gguf_tokenizer(read_gguf(root).metadata, root)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
