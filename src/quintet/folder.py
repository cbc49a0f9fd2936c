"""The readable files in a model's folder, and the contents of a folder without a model."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    QuintetError,
    UnsupportedModelError,
    shown,
)
from quintet.files import read_json

CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHTS = (".safetensors", ".gguf")
# Where older programs keep how they quantised a model, and what it is called today.
QUANTIZATION_FILES = MappingProxyType({"quantize_config.json": "gptq", "quant_config.json": "awq"})


class AdapterFolderError(UnsupportedModelError):
    """A folder, or a file in GGUF, holds an adapter where a model is asked for.

    Args:
        path: the folder, or the file.
        base: the model that the adapter is of, as its file names it; None if it does not.
    """

    def __init__(self, path: Path, base: str | None) -> None:
        self.path, self.base = path, base
        model = "its base model" if base is None else shown(base)
        super().__init__(
            f"{path} is an adapter{'' if base is None else f' of {model}'}, not a model: "
            f"load {model}, and put it on that by model.load_adapter({str(path)!r}); on the "
            f"command line, name the model and --adapter {path}"
        )

    @contextmanager
    def of_base(self) -> Iterator[str]:
        """Open the adapter's base model by name inside the context.

        Raises:
            AdapterFolderError: it is not named, not there, or an adapter itself.
        """
        if self.base is None:
            raise self
        try:
            yield self.base
        except (ModelNotFoundError, AdapterFolderError) as error:
            raise self from error

    def __reduce__(self) -> tuple[object, ...]:
        return UnsupportedModelError, (str(self),)


def checked_path(path: object, argument: str) -> Path:
    """Return a path the system can represent, with `~` expanded.

    Raises:
        InputError: it is no path, or has a character or a length that no file can have.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{argument}={shown(path)} has to be a path")
    text = os.fspath(path)
    try:
        expanded = Path(text).expanduser()
        # Whether there is such a file does not matter; whether there could be one does.
        os.lstat(expanded)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{argument}={shown(text)} cannot be a path: {error}") from None
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise InputError(
                f"{argument}={shown(text)} cannot be looked at: {error.strerror}"
            ) from None
    return expanded


def find_file(directory: Path, name: str) -> Path | None:
    """Return the path of a regular file in a model's folder, or None if it is missing.

    A link may lead to where the hub's cache keeps files, to the file of the same name in another
    model's folder, and from weights to weights. Anywhere else, somebody who made the folder could
    have us read, and publish again with the model, what is not the model's.

    Raises:
        CheckpointError: it is a directory or a device, or a link that leads elsewhere.
    """
    path = directory / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        home = directory.resolve()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} has to be a regular file, and is not")
    if not (
        real.is_relative_to(home)
        or (path.suffix == real.suffix and path.suffix in WEIGHTS)
        or _is_of_a_model(real, path.name)
        or _is_cached(real, home)
    ):
        raise CheckpointError(
            f"{path} is a link that leads out of its directory, to {real}; put the file itself "
            "there, or open the directory that holds it (a link may lead to the file of the same "
            f"name in another model's directory, and weights to weights, as *{WEIGHTS[0]})"
        )
    return path


def _is_of_a_model(real: Path, name: str) -> bool:
    if real.name != name or not (real.parent / CONFIG_NAME).is_file():
        return False
    return any(real.parent.glob(f"*{WEIGHTS[0]}"))


def _is_cached(real: Path, directory: Path) -> bool:
    # huggingface_hub: models--owner--name/snapshots/<commit>/file -> ../../blobs/<hash>
    if real.parent.name == "blobs" and (real.parent.parent / "snapshots").is_dir():
        return True
    snapshots = [folder for folder in directory.parents if folder.name == "snapshots"]
    return any(real.is_relative_to(folder.parent / "blobs") for folder in snapshots)


def what_else(path: Path) -> QuintetError | None:
    """Return the error for a path that holds no model (an adapter, a file, empty), or None."""
    if path.is_file():
        inside = path.parent if (path.parent / CONFIG_NAME).is_file() else None
        hint = f" (did you mean {str(inside)!r}?)" if inside else ""
        return ModelNotFoundError(
            f"{shown(str(path))} is a file; a model is a directory with {CONFIG_NAME} in it{hint}"
        )
    if (path / CONFIG_NAME).exists():
        return None
    adapter = path / ADAPTER_CONFIG_NAME
    if adapter.is_file():
        return _adapter(path, adapter)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return ModelNotFoundError(f"{path} cannot be looked into: {error.strerror}")
    if not names:
        return ModelNotFoundError(
            f"{path} is empty; a model is a directory with {CONFIG_NAME}, weights and a tokenizer"
        )
    return None


def _adapter(path: Path, adapter: Path) -> UnsupportedModelError:
    base: object = None
    with suppress(OSError, CheckpointError):
        base = read_json(adapter).get("base_model_name_or_path")
    return AdapterFolderError(path, base if isinstance(base, str) and base else None)
