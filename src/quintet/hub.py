"""From a model's name to a local directory: a path, or a hub id via `huggingface_hub`.

And the way back: what can be saved into a directory can be pushed.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quintet.download import cause_of, download
from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    OfflineError,
    SaveError,
    shown,
)
from quintet.files import MAX_LISTING_BYTES, read_json
from quintet.folder import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    QUANTIZATION_FILES,
    checked_path,
    what_else,
)
from quintet.sources import find_gguf

__all__ = [
    "CONFIG_NAME",
    "CONFIG_PATTERNS",
    "SINGLE_WEIGHTS",
    "TOKENIZER_PATTERNS",
    "WEIGHTS_INDEX",
    "Pushable",
    "demo_model",
    "locate",
    "locate_weights",
    "with_variant",
]

# Of an adapter, to say what it is.
_BESIDE = ("generation_config.json", ADAPTER_CONFIG_NAME, *QUANTIZATION_FILES)
CONFIG_PATTERNS = (CONFIG_NAME, *_BESIDE)
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Pickled weights are never read, so never downloaded.
SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_VARIANT = re.compile(r"\w[\w-]{,49}")
_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def demo_model() -> Path:
    """Return the directory of the tiny model that comes with the package."""
    return Path(__file__).parent / "demo"


def locate(
    name_or_path: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    force_download: bool = False,
    gguf_file: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the directory with a model's files, downloading `patterns` if needed.

    Of a model in GGUF it is the file itself, by whatever name it has (`quintet.sources`); a
    directory goes before its file where it has what is asked for.

    `force_download` fetches them again where the cache has them, and means nothing to a directory.
    An existing directory always wins over a hub id of the same spelling. `HF_HUB_OFFLINE`,
    `HF_HOME` and the other variables of `huggingface_hub` are obeyed.

    Raises:
        ModelNotFoundError: no such directory, repository, revision, or no access to it.
        OfflineError: a hub id that is not in the local cache while the network is off.
        CheckpointError: a file came twice with another content than the hub says it has.
        SaveError: the cache cannot be written.
        UnsupportedModelError: it is an adapter, or in another format.
        InputError: something that cannot be a path, `gguf_file` beside a file, or `force_download`
            without the network.
    """
    if force_download and local_files_only:
        raise InputError("force_download=True and local_files_only=True contradict each other")
    path = checked_path(name_or_path, "name_or_path")
    name = str(os.fspath(name_or_path))
    if cache_dir is not None:
        checked_path(cache_dir, "cache_dir")
    if gguf_file is None and path.is_dir():
        return _inside(path, subfolder, name, patterns)
    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    found = find_gguf(
        name_or_path,
        gguf_file,
        subfolder=subfolder,
        local_files_only=local_files_only,
        **where,  # type: ignore[arg-type]
    )
    if found is not None:
        return found.path
    if path.is_file() and (reason := what_else(path)):
        raise reason
    if not _REPO_ID.fullmatch(name) or name.startswith(("./", "../", "~", "/")):
        raise ModelNotFoundError(
            f"no directory {shown(name)}, and it is not a hub id of the form 'owner/name'"
        )
    if subfolder:
        checked_path(subfolder, "subfolder")
    fetched = [
        f"{subfolder.strip('/')}/{pattern}" if subfolder else pattern for pattern in patterns
    ]
    root = download(name, fetched, revision, cache_dir, token, local_files_only, force_download)
    return _inside(root, subfolder, name, patterns)


class Pushable:
    """An object that can be saved into a directory, and pushed to the hub."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any:
        """Write everything into a directory."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> str:
        """Save into a hub repository in one commit, creating it if needed; return its URL.

        Other files there are left alone. `save_options` are those of `save_pretrained`.

        Raises:
            ModelNotFoundError: no such repository or revision, or no right to write to it.
            OfflineError: the network is off or the hub cannot be reached.
            SaveError: the hub refused the commit.
        """
        with tempfile.TemporaryDirectory(prefix="quintet-push-") as directory:
            self.save_pretrained(directory, **save_options)
            return push_folder(
                Path(directory),
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder to a repository in one commit; see `Pushable.push_to_hub`."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.is_offline_mode():
        raise OfflineError(f"{repo_id!r} cannot be pushed to: HF_HUB_OFFLINE is set; unset it")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo_id!r} is not a valid hub id: {error}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalTokenNotFoundError) as error:
        raise ModelNotFoundError(
            f"{repo_id!r} cannot be pushed to: no such repository or revision for you; check the "
            "spelling, and run `hf auth login` or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise OfflineError(f"{repo_id!r} cannot be pushed to: {error}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise ModelNotFoundError(
                f"you may not write to {repo_id!r} ({code}); run `hf auth login` with a token that "
                "may, or set HF_TOKEN"
            ) from error
        raise SaveError(f"the hub refused the commit to {repo_id!r}: {error}") from error
    # As where the hub is read: what a broken connection raises differs between versions.
    except Exception as error:
        raise OfflineError(
            f"{repo_id!r} cannot be pushed to, as the hub could not be reached at "
            f"{constants.ENDPOINT}: {cause_of(error)}"
        ) from error
    return str(done.commit_url)


def locate_weights(
    name_or_path: str | os.PathLike[str],
    variant: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    gguf_file: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the directory with a model's weights, downloading those of one variant.

    Of a repository that has them in several dtypes and formats, the one file or the shards that
    the index names are fetched, and nothing else. A model in GGUF is the file itself, as `locate`
    says.

    Raises:
        ModelNotFoundError: no such directory, repository, revision, or no access to it.
        OfflineError: a hub id that is not in the local cache while the network is off.
    """
    where: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "subfolder": subfolder,
        "gguf_file": gguf_file,
    }
    single, index = (with_variant(name, variant) for name in (SINGLE_WEIGHTS, WEIGHTS_INDEX))
    root = locate(name_or_path, (single, index), **where)
    if root.is_file() or Path(os.fspath(name_or_path)).expanduser().is_dir():
        return root
    if (root / single).is_file():
        return root
    shards = _shards(root / index)
    return locate(name_or_path, (index, *shards), **where) if shards else root


def with_variant(name: str, variant: str | None) -> str:
    """Return the file name of a variant of a weights file.

    `model.fp16.safetensors`, `model.safetensors.index.fp16.json`.

    Raises:
        InputError: the variant cannot be a part of a file's name.
    """
    if variant is None:
        return name
    if not isinstance(variant, str) or not _VARIANT.fullmatch(variant):
        raise InputError(f"variant={shown(variant)} has to be a word such as 'fp16'")
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def _shards(index: Path) -> list[str]:
    """Return the files named by an index, which is validated when it is opened."""
    try:
        named = read_json(index, MAX_LISTING_BYTES).get("weight_map")
    except (CheckpointError, OSError):
        return []
    names = set(named.values()) if isinstance(named, dict) else set()
    # What could be a pattern or a path is no name of a shard.
    return sorted(n for n in names if isinstance(n, str) and re.fullmatch(r"[\w.-]+", n))


def _inside(root: Path, subfolder: str, name: str, patterns: Sequence[str]) -> Path:
    path = (root / checked_path(subfolder, "subfolder")).resolve() if subfolder else root
    if subfolder and not path.is_relative_to(root.resolve()):
        raise ModelNotFoundError(f"subfolder={subfolder!r} leads out of {name!r}")
    if not path.is_dir():
        raise ModelNotFoundError(f"{name!r} has no folder {subfolder!r}")
    # An adapter may have a tokenizer, and that can be read.
    if any(any(path.glob(pattern)) for pattern in patterns if pattern not in _BESIDE):
        return path
    if (found := find_gguf(path)) is not None:
        return found.path
    if reason := what_else(path):
        raise reason
    return path
