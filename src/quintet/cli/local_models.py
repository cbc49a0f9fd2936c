"""Lists the models on this machine: hub cache, folders, other programs."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintet.errors import ModelNotFoundError, QuintetError, shown
from quintet.files import read_json, read_text

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

GGUF = ".gguf"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        model: what commands call it.
        revision: of a hub id.
        family: its model_type; None if that cannot be told.
        weights: the format or dtype they are in.
        size: of all its files, in bytes.
        used: when, in seconds since 1970.
        talks: whether it has weights and a chat template.
    """

    model: str
    revision: str | None
    family: str | None
    weights: str | None
    size: int
    used: float
    talks: bool


def scanned(cache_dir: str | None) -> "HFCacheInfo | None":
    """Scan the hub cache, or return None if there is no cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(cache_dir)
    except CacheNotFound:
        return None


def in_cache(cache_dir: str | None) -> Iterator[LocalModel]:
    """Yield the models in the hub cache, each revision of each."""
    found = scanned(cache_dir)
    repos = [] if found is None else [repo for repo in found.repos if repo.repo_type == "model"]
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            config = _config(revision.snapshot_path)
            named = ", ".join(sorted(revision.refs)) or revision.commit_hash[:8]
            if not config:
                yield from _files(revision.snapshot_path, f"{repo.repo_id}:", named)
            if not config and any(revision.snapshot_path.glob(f"*{GGUF}")):
                continue
            yield LocalModel(
                repo.repo_id,
                named,
                _family(config),
                _weights(config),
                revision.size_on_disk,
                repo.last_accessed,
                _talks(revision.snapshot_path),
            )


def in_folder(name: str) -> Iterator[LocalModel]:
    """Yield the model that a folder is, or those in the folders in it.

    Raises:
        ModelNotFoundError: there is no such folder.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {shown(name)}")
    inside = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
    yield from _files(folder, f"{folder}/")
    for path in inside:
        if not (path / "config.json").is_file():
            continue
        config = _config(path)
        stats = [file.stat() for file in path.iterdir() if file.is_file()]
        yield LocalModel(
            str(path),
            None,
            _family(config),
            _weights(config),
            sum(stat.st_size for stat in stats),
            max(stat.st_mtime for stat in stats),
            _talks(path),
        )


def in_other_programs() -> Iterator[LocalModel]:
    """Yield the models that Ollama keeps, and the small one that a package index has."""
    from quintet.sources import fetch_smollm2, find_gguf, ollama_names

    for name in ollama_names():
        with suppress(QuintetError):
            if (found := find_gguf(name)) is not None:
                yield _file(name, [found.path])
    with suppress(QuintetError):
        yield _file("smollm2", [fetch_smollm2(local_files_only=True)])


def _files(folder: Path, prefix: str, revision: str | None = None) -> Iterator[LocalModel]:
    """Yield the models in GGUF in a folder, each named by its file."""
    from quintet.sources import models_among

    for first, files in models_among(path.name for path in folder.iterdir()).items():
        paths = [folder / file for file in files]
        if all(path.is_file() for path in paths):
            yield _file(f"{prefix}{first}", paths, revision)


def _file(name: str, paths: list[Path], revision: str | None = None) -> LocalModel:
    from quintet.gguf import config_values, read_gguf

    family, talks = None, False
    with suppress(QuintetError):
        file = read_gguf(paths[0])
        talks = "tokenizer.chat_template" in file.metadata
        family = config_values(file)["model_type"]
    stats = [path.stat() for path in paths]
    size, used = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
    return LocalModel(name, revision, family, "GGUF", size, used, talks)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except (OSError, QuintetError):
        return {}


def _family(config: dict[str, Any]) -> str | None:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def _weights(config: dict[str, Any]) -> str | None:
    if settings := config.get("quantization_config"):
        from quintet.quantization.request import read

        try:
            scheme = read(settings).scheme()
        except QuintetError:
            scheme = None
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        weights = None if scheme is None else scheme.weights
        return str(method) if weights is None else weights.name
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if isinstance(dtype, str) else None


def _talks(folder: Path) -> bool:
    if not any(folder.glob("*.safetensors")):
        return False
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return '"chat_template"' in read_text(folder / "tokenizer_config.json")
    except (OSError, QuintetError):
        return False
