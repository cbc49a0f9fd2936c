"""From a directory or hub id to a model, and back: the one place that composes the parts.

The model is built without memory, names and shapes are compared with the checkpoint's headers,
and only then is data read, one tensor after the other.
"""

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quintet.checkpoint import Checkpoint, TensorInfo, compare, save
from quintet.configuration.base import PreTrainedConfig, read_config
from quintet.errors import InputError, listed
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.hub import CONFIG_PATTERNS, WEIGHT_PATTERNS, locate
from quintet.modeling.placement import DeviceMap, named_dtype, single_device

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel

__all__ = ["NewHeadWarning", "Source", "load", "write"]

Model = TypeVar("Model", bound="PreTrainedModel")


class NewHeadWarning(UserWarning):
    """A classification head starts from random weights, because the checkpoint has none."""


class UnusedTensorWarning(UserWarning):
    """The checkpoint holds tensors that the model has no place for."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from."""

    name_or_path: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""

    def locate(self) -> Path:
        """Return the local directory, downloading config and weights if needed."""
        return locate(
            self.name_or_path,
            (*CONFIG_PATTERNS, *WEIGHT_PATTERNS),
            revision=self.revision,
            cache_dir=self.cache_dir,
            token=self.token,
            local_files_only=self.local_files_only,
            subfolder=self.subfolder,
        )


def load(
    cls: type[Model],
    source: Source,
    *,
    config: PreTrainedConfig | None,
    dtype: str | torch.dtype | None,
    device_map: DeviceMap,
    overrides: Mapping[str, Any],
) -> Model:
    """Load a model of class `cls`; see `PreTrainedModel.from_pretrained`."""
    device = single_device(device_map)
    root = source.locate()
    if config is None:
        _check_overrides(cls, overrides, known=[*read_config(root)])
        config = cls.config_class.from_pretrained(root, **overrides)
        config.name_or_path = os.fspath(source.name_or_path)
    elif overrides:
        raise InputError(
            f"{', '.join(overrides)}: give either a config or keys to replace in the checkpoint's"
        )
    checkpoint = Checkpoint.open(root)
    target = _target_dtype(dtype, config, checkpoint.tensors)

    with torch.device("meta"):
        model = cls(config)
    _fill(model, checkpoint, str(root), target, device)
    model.to(device)
    config.dtype = str(target).removeprefix("torch.")
    if (root / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(root)
    return model.eval()


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str,
    texts: Mapping[str, str],
) -> None:
    """Write weights and the files beside them; see `PreTrainedModel.save_pretrained`."""
    save(Path(directory), tensors, max_shard_size=max_shard_size, text_files=texts)


def _fill(
    model: "PreTrainedModel",
    checkpoint: Checkpoint,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every parameter and persistent buffer of a meta model its tensor."""
    tied = model.tied_names()
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}
    names = _names_in_file(model, expected, checkpoint.tensors)
    found = {
        name: checkpoint.tensors[in_file]
        for name, in_file in names.items()
        if in_file in checkpoint.tensors
    }
    fresh = [n for n in expected if n not in found and n.startswith(model.new_head)]
    difference = compare({k: v for k, v in expected.items() if k not in fresh}, found)
    difference.raise_if_incomplete(where)

    # Before reading: a head may be there in part, and what is read must stay.
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fresh):
        head = model.get_submodule(path)
        for leaf, parameter in list(head.named_parameters(recurse=False)):
            _assign(head, leaf, torch.empty_like(parameter, dtype=dtype, device=device))
        model.init_module(head)
    sources = {names[name]: name for name in found}
    for in_file, tensor in checkpoint.read(sources):
        _assign(model, sources[in_file], _cast(tensor, dtype).to(device))
    model.tie_weights()
    _tell(model, where, fresh, set(checkpoint.tensors) - set(sources))


def _names_in_file(
    model: "PreTrainedModel", expected: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Map the model's names to the checkpoint's, which may be with or without a head."""
    own = f"{model.base_model_prefix}." if model.base_model is not model else ""
    inner = [name.removeprefix(own) for name in expected if name.startswith(own)]
    prefixes = dict.fromkeys((own, "", "model.", "transformer."))
    prefix = max(prefixes, key=lambda p: sum(p + name in tensors for name in inner))
    names = {
        name: prefix + name.removeprefix(own) if name.startswith(own) else name for name in expected
    }
    # A file may hold a tied tensor under its other name alone.
    for alias, name in model.tied_names().items():
        if names[name] not in tensors and alias in tensors:
            names[name] = alias
    return names


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        module.register_buffer(leaf, tensor)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tell(model: "PreTrainedModel", where: str, fresh: list[str], left: set[str]) -> None:
    if fresh:
        warnings.warn(
            f"{where} has no {', '.join(fresh)}: this head of {type(model).__name__} starts from "
            "random weights and has to be trained",
            NewHeadWarning,
            stacklevel=5,
        )
    # A head that this class does not have, and second names of tied tensors, are no loss.
    known_heads = ("lm_head.", "score.", "qa_outputs.")
    lost = sorted(name for name in left if not name.startswith(known_heads))
    if lost:
        warnings.warn(
            f"{where} holds {len(lost)} tensors that {type(model).__name__} has no place for:\n"
            f"{listed(lost)}",
            UnusedTensorWarning,
            stacklevel=5,
        )


def _check_overrides(
    cls: type["PreTrainedModel"], given: Mapping[str, Any], known: list[str]
) -> None:
    allowed = {*cls.config_class.accepted_keys(), *known}
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *OPTIONS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"from_pretrained has no option {key!r}, and {cls.config_class.__name__} "
                f"no key of that name{hint}"
            )


OPTIONS = ("cache_dir", "config", "device_map", "dtype", "local_files_only", "revision", "token")


def _target_dtype(
    dtype: str | torch.dtype | None, config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]
) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        saved = (t.dtype for t in tensors.values() if t.dtype.is_floating_point)
        return config.torch_dtype or next(saved, torch.get_default_dtype())
    return named_dtype(dtype)
