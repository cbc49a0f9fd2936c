"""From a directory or hub id to a model, and back: the one place that composes the parts.

The model is built without memory, names and shapes are compared with the checkpoint's headers,
and only then is data read, one tensor after the other.
"""

import copy
import difflib
import itertools
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quintet.checkpoint import (
    InMemory,
    Renamed,
    StackExperts,
    TensorInfo,
    Weights,
    open_weights,
    read_consistently,
    save,
    split_tensors,
)
from quintet.configuration.base import PreTrainedConfig
from quintet.configuration.reading import read_config
from quintet.errors import InputError, UnsupportedBackendError, listed
from quintet.folder import AdapterFolderError, find_file
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.generation.option_names import asks_nothing
from quintet.hub import CONFIG_PATTERNS, locate, locate_weights
from quintet.kernels.large_pages import hold_in_large_pages
from quintet.modeling.adapting import Adapting
from quintet.modeling.core import ModelCore
from quintet.modeling.dispatch import dispatch_model
from quintet.modeling.holding import how_held, in_words
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.key_mapping import KeyMapping, map_keys
from quintet.modeling.placement import (
    DeviceMap,
    MaxMemory,
    first_device,
    named_dtype,
    parts,
    place,
)
from quintet.modeling.weight_loader import WeightLoader, load_weights
from quintet.quantization import QuantizationConfig, resolve_quantization

__all__ = ["ModelSource", "NewHeadWarning", "Options", "load", "write"]

log = logging.getLogger("quintet.loading")
Model = TypeVar("Model", bound=ModelCore)


class NewHeadWarning(UserWarning):
    """A classification head starts from random weights, because the checkpoint has none."""


class UnusedTensorWarning(UserWarning):
    """The checkpoint holds tensors that the model has no place for."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from."""

    name_or_path: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""
    variant: str | None = None
    gguf_file: str | None = None

    @property
    def where(self) -> dict[str, Any]:
        """What tells where files are, but for the name."""
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "local_files_only": self.local_files_only,
            "subfolder": self.subfolder,
        }

    def locate(self, *, weights: bool = True) -> Path:
        """Return the local directory or GGUF file, downloading config and weights if needed."""
        where = {**self.where, "gguf_file": self.gguf_file}
        root = locate(self.name_or_path, CONFIG_PATTERNS, **where)
        if weights:
            root = locate_weights(self.name_or_path, self.variant, **where)
        return root


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is loaded; see `PreTrainedModel.from_pretrained`."""

    generation_config: GenerationConfig | None = None
    dtype: str | torch.dtype | None = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory | None = None
    state_dict: Mapping[str, Tensor] | None = None
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    quantize: str | None = None
    quantization_config: QuantizationConfig | Mapping[str, Any] | None = None


def load(
    cls: type[Model],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    options: Options,
) -> tuple[Model, dict[str, Any]]:
    """Load a model of class `cls`, and say what did not fit; see `from_pretrained`."""
    # Weights that are made in inference mode could not be trained, ever.
    with torch.inference_mode(False):
        try:
            return _load(cls, source, given, overrides, options)
        except AdapterFolderError as found:
            if source is None or not issubclass(cls, Adapting):
                raise
            with found.of_base() as name:
                base = replace(source, name_or_path=name, revision=None, subfolder="")
                model, report = _load(cls, base, given, overrides, options)
            model.load_adapter(source.name_or_path, **source.where)
            return model, report


def _load(
    cls: type[Model],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    options: Options,
) -> tuple[Model, dict[str, Any]]:
    overrides = _effective(overrides)
    first = first_device(options.device_map)
    root = None if source is None else source.locate(weights=options.state_dict is None)

    def files() -> tuple[PreTrainedConfig, Weights, GenerationConfig | None]:
        config = _config(cls, source, root, given, overrides)
        return config, _weights(source, root, options), _generation_config(source, root)

    config, weights, generation_config = (
        files()
        if source is None or root is None
        else read_consistently(root, files, variant=source.variant)
    )
    request = resolve_quantization(
        vars(config).get("quantization_config"),
        options.quantize,
        options.quantization_config,
        first,
    )
    target = _target_dtype(options.dtype, config, weights.tensors)
    where = "state_dict" if root is None or options.state_dict is not None else str(root)

    model = init_on_meta(cls, config)
    mapping = map_keys(
        model,
        weights.tensors,
        held_as=request.source,
        ignore_mismatched_sizes=options.ignore_mismatched_sizes,
    )
    mapping.difference.raise_if_incomplete(where)
    scheme = request.scheme(mapping.held)
    slots = {} if scheme is None else model.quantize_modules(scheme, target)
    model.drop(mapping.optional)
    model_parts = parts(model, target, model.keep_in_fp32)
    placement = place(options.device_map, model_parts, options.max_memory)
    loader = WeightLoader(model, target, placement.device_of, slots)
    if log.isEnabledFor(logging.INFO):
        counts = how_held(mapping, weights.tensors, slots, loader.dtype_of)
        log.info("%s: %s", where, in_words(counts))
    load_weights(loader, mapping, weights, where)
    model.tie_weights()
    _check_filled(model)
    hold_in_large_pages([*model.parameters(), *model.buffers()])
    dispatch_model(model, placement, model_parts)
    if placement.several:
        model.hf_device_map = dict(placement.devices)
    model.note_quantization(None if scheme is None else request.target)
    _warn(model, where, mapping)

    model.config.dtype = str(target).removeprefix("torch.")
    wanted = options.generation_config or generation_config
    if wanted is not None:
        model.generation_config = wanted
    return model.eval(), mapping.report()


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, Tensor],
    *,
    stacks: Sequence[StackExperts],
    max_shard_size: int | str,
    variant: str | None,
    texts: Mapping[str, str],
) -> None:
    """Write weights and the files beside them; see `PreTrainedModel.save_pretrained`.

    Args:
        tensors: named as in the model.
        files: named as on disk already.
    """
    named = {**dict(split_tensors(tensors, stacks)), **files}
    save(Path(directory), named, max_shard_size=max_shard_size, variant=variant, text_files=texts)


def _check_filled(model: ModelCore) -> None:
    """Refuse a model whose weights somebody's context has taken away again."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if lost := [name for name, tensor in tensors if tensor.is_meta]:
        raise UnsupportedBackendError(
            f"{len(lost)} tensors ended without data, {lost[0]} among them: something around "
            "from_pretrained, such as accelerate's init_empty_weights, moves new parameters to "
            "meta; load without it, or build the model without weights by from_config"
        )


def _config(
    cls: type[Model],
    source: ModelSource | None,
    root: Path | None,
    config: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
) -> PreTrainedConfig:
    if isinstance(config, str | os.PathLike):
        where = {} if source is None else source.where
        _check_overrides(cls, overrides, known=[])
        return cls.config_class.from_pretrained(config, **where, **overrides)
    if config is not None:
        replaced = copy.deepcopy(cls.config_class.of(config))
        more = dict(overrides)
        if (attention := more.pop("attn_implementation", None)) is not None:
            replaced.attn_implementation = attention
        if more:
            raise InputError(
                f"{', '.join(more)}: give either a config or keys to replace in the checkpoint's"
            )
        return replaced
    if source is None or root is None:
        raise InputError("without a name or path, from_pretrained needs config and state_dict")
    _check_overrides(cls, overrides, known=[*read_config(root)])
    config = cls.config_class.from_pretrained(root, **overrides)
    config.name_or_path = os.fspath(source.name_or_path)
    return config


def _weights(source: ModelSource | None, root: Path | None, options: Options) -> Weights:
    weights: Weights
    if options.state_dict is not None:
        weights = InMemory(options.state_dict)
    elif source is None or root is None:
        raise InputError("without a name or path, from_pretrained needs config and state_dict")
    else:
        weights = open_weights(root, variant=source.variant)
    return Renamed(weights, options.key_mapping) if options.key_mapping else weights


def _generation_config(source: ModelSource | None, root: Path | None) -> GenerationConfig | None:
    if source is None or root is None:
        return None
    if root.is_file():
        # By its own name: Ollama says more of a model than the model's file.
        where = {**source.where, "gguf_file": source.gguf_file}
        return GenerationConfig.from_pretrained(source.name_or_path, **where)
    if find_file(root, GENERATION_CONFIG_NAME) is None:
        return None
    return GenerationConfig.from_pretrained(root)


def _warn(model: ModelCore, where: str, mapping: KeyMapping) -> None:
    if mapping.mismatched:
        lines = [
            f"{m.name}: expected {list(m.expected)}, found {list(m.found)}"
            for m in mapping.mismatched
        ]
        warnings.warn(
            f"{where} has other shapes, which ignore_mismatched_sizes lets pass:\n{listed(lines)}\n"
            f"{', '.join(mapping.reshaped)} of {type(model).__name__} start from random weights "
            "and have to be trained",
            NewHeadWarning,
            stacklevel=4,
        )
    if mapping.absent:
        warnings.warn(
            f"{where} has no {', '.join(mapping.absent)}: this head of {type(model).__name__} "
            "starts from random weights and has to be trained",
            NewHeadWarning,
            stacklevel=4,
        )
    if lost := [name for name in mapping.lost if not _predicts(name, model.config)]:
        warnings.warn(
            f"{where} holds {len(lost)} tensors that {type(model).__name__} has no place for:\n"
            f"{listed(lost)}",
            UnusedTensorWarning,
            stacklevel=4,
        )


def _predicts(name: str, config: PreTrainedConfig) -> bool:
    """Tell whether a tensor is of a layer that predicts further tokens, which heads do not."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    first, more = config.num_hidden_layers, vars(config).get("num_nextn_predict_layers") or 0
    return found is not None and first <= int(found[1]) < first + more


def _check_overrides(cls: type[ModelCore], given: Mapping[str, Any], known: list[str]) -> None:
    allowed = {*cls.config_class.accepted_keys(), *known}
    for key in given:
        if key in ABSENT:
            raise InputError(f"{key}: {ABSENT[key]} is not in this version")
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *OPTIONS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"from_pretrained has no option {key!r}, and {cls.config_class.__name__} "
                f"no key of that name{hint}"
            )


def _effective(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without those that ask for nothing, as their defaults there do."""
    return {
        key: value
        for key, value in given.items()
        if key not in WITHOUT_EFFECT
        and not (key in ABSENT and asks_nothing(value))
        and not (key == "attn_implementation" and value is None)
    }


# Pickled weights, of which it speaks, are never read.
WITHOUT_EFFECT = ("weights_only",)
# What Transformers takes, and people will try.
ABSENT = {
    "force_download": "fetching again what was checked against the hub's digests (`quintet rm` "
    "removes it)",
    "from_flax": "reading the weights of another framework",
    "from_tf": "reading the weights of another framework",
    "proxies": "proxies as an argument (the environment's HTTPS_PROXY is obeyed)",
    "use_kernels": "kernels from a hub",
    "load_in_8bit": "quantisation outside of quantization_config=BitsAndBytesConfig(...)",
    "load_in_4bit": "quantisation outside of quantization_config=BitsAndBytesConfig(...)",
    "offload_folder": "offloading to a disk (weights are mapped from their files already)",
    "offload_state_dict": "offloading to a disk (weights are mapped from their files already)",
    "tp_plan": "tensor parallelism",
}
OPTIONS = (
    *("cache_dir", "config", "device_map", "dtype", "gguf_file", "ignore_mismatched_sizes"),
    *("key_mapping",),
    *("local_files_only", "output_loading_info", "revision", "state_dict", "subfolder", "token"),
    "variant",
)


def _target_dtype(
    dtype: str | torch.dtype | None, config: PreTrainedConfig, tensors: Mapping[str, TensorInfo]
) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        floats = (t.dtype for t in tensors.values() if t.dtype.is_floating_point)
        saved = (found for found in floats if found.itemsize > 1)
        return config.torch_dtype or next(saved, torch.get_default_dtype())
    return named_dtype(dtype)
