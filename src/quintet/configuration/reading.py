"""Reads a model's configuration keys from its files."""

from pathlib import Path
from typing import Any

from quintet.configuration.numbers import decoded
from quintet.errors import CheckpointError, ModelNotFoundError
from quintet.files import read_json
from quintet.folder import CONFIG_NAME, QUANTIZATION_FILES, find_file, what_else
from quintet.gguf import config_values, read_gguf


def read_config(root: Path) -> dict[str, Any]:
    """Read `config.json` of a model's directory, or a GGUF file's metadata.

    Raises:
        ModelNotFoundError: the directory has none.
        UnsupportedModelError: it holds an adapter, or a model in another format.
        CheckpointError: it is not a JSON object.
    """
    if root.is_file():
        return config_values(read_gguf(root))
    path = find_file(root, CONFIG_NAME)
    if path is None:
        raise what_else(root) or ModelNotFoundError(
            f"{root} has no {CONFIG_NAME}; it is not a model's directory"
        )
    try:
        # The whole is a mapping of keys, whatever its only key is called.
        content = read_json(path)
        values = {key: decoded(value) for key, value in content.items()}
        _add_quantization(root, values)
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply; fetch the file again") from None
    return values


def _add_quantization(root: Path, values: dict[str, Any]) -> None:
    """Move quantisation settings of other writers to `quantization_config`."""
    elsewhere = values.pop("quantization", None)
    if values.get("quantization_config") is not None and not isinstance(elsewhere, dict):
        return
    if isinstance(older := values.pop("compression_config", None), dict):
        values["quantization_config"] = {"quant_method": "compressed-tensors", **older}
        return
    if isinstance(elsewhere, dict):
        values["quantization_config"] = {"quant_method": "mlx", **elsewhere}
        return
    for name, method in QUANTIZATION_FILES.items():
        if (path := find_file(root, name)) is not None:
            content = read_json(path)
            values["quantization_config"] = {"quant_method": method, **content}
            return
