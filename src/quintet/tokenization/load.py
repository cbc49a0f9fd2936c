"""Loads the tokenizer of a directory or hub id."""

import os
from pathlib import Path
from typing import Unpack

from quintet.errors import CheckpointError, TokenizerError
from quintet.files import read_json
from quintet.folder import CONFIG_NAME
from quintet.hub import TOKENIZER_PATTERNS
from quintet.tokenization.base import PreTrainedTokenizer
from quintet.tokenization.files import TokenizerFiles
from quintet.tokenization.opening import open_files
from quintet.tokenization.options import TokenizerOptions, check_names
from quintet.tokenization.qwen2 import Qwen2Tokenizer


def load(
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    force_download: bool = False,
    trust_remote_code: bool | None = None,
    use_fast: bool | None = None,
    legacy: bool | None = None,
    gguf_file: str | os.PathLike[str] | None = None,
    **options: Unpack[TokenizerOptions],
) -> PreTrainedTokenizer:
    """Load a tokenizer; see `PreTrainedTokenizer.from_pretrained`.

    The class only says how a bare `vocab.json` is read: where there is a `tokenizer.json`, that
    file is the pipeline.

    Raises:
        ModelNotFoundError: no such directory or repository, or no tokenizer in it.
        TokenizerError: its files are damaged or contradict each other.
        InputError: an option is unknown or not usable.
    """
    check_names("AutoTokenizer.from_pretrained", options, TokenizerOptions.__annotations__)
    files = open_files(
        pretrained_model_name_or_path,
        (*TOKENIZER_PATTERNS, CONFIG_NAME),
        gguf_file=gguf_file,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        subfolder=subfolder,
        force_download=force_download,
    )
    kind = Qwen2Tokenizer if _is_qwen2(files) else PreTrainedTokenizer
    named: TokenizerOptions = {"name_or_path": os.fspath(pretrained_model_name_or_path)}
    return kind._from_files(files, {**named, **options})


def _is_qwen2(files: TokenizerFiles) -> bool:
    if name := files.settings.get("tokenizer_class"):
        return str(name).startswith("Qwen2")
    return _model_type(files.root).startswith("qwen2")


def _model_type(root: Path) -> str:
    path = root / CONFIG_NAME
    if not path.is_file():
        return ""
    try:
        return str(read_json(path).get("model_type", ""))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
