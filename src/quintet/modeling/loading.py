"""Loading and saving a model: composes hub, checkpoint, placement and quantisation.

The model is built without memory, names and shapes are compared with the checkpoint's headers,
and only then is data read, one tensor after the other.
"""

import copy
import difflib
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from quintet.errors import InputError, listed
from quintet.folder import AdapterFolderError, find_file
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.generation.option_names import is_default
from quintet.kernels.large_pages import hold_in_large_pages
from quintet.modeling.adapting import Adapting
from quintet.modeling.core import ModelCore
from quintet.modeling.dispatch import dispatch_model
from quintet.modeling.holding import in_words, number_formats
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.key_mapping import KeyMapping, map_keys
from quintet.modeling.own_part import OwnPart
from quintet.modeling.placement import (
    DeviceMap,
    MaxMemory,
    first_device,
    named_dtype,
    parts,
    place,
)
from quintet.modeling.source import ModelSource
from quintet.modeling.weight_loader import WeightLoader, check_filled, load_weights
from quintet.parallel.slices import ParameterSlices
from quintet.parallel.together import Together
from quintet.parallel.turns import in_turn
from quintet.parallel.world import World
from quintet.quantization import (
    QuantizationConfig,
    Slot,
    resolve_quantization,
)

log = logging.getLogger("quintet.loading")
Model = TypeVar("Model", bound=ModelCore)


class NewHeadWarning(UserWarning):
    """A classification head starts from random weights; the checkpoint has none."""


class UnusedTensorWarning(UserWarning):
    """The checkpoint holds tensors that the model does not use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `PreTrainedModel.from_pretrained`."""

    generation_config: GenerationConfig | None = None
    dtype: str | torch.dtype | None = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory | None = None
    state_dict: Mapping[str, Tensor] | None = None
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    quantize: str | None = None
    quantization_config: QuantizationConfig | Mapping[str, Any] | None = None
    world: World | None = None
    slices: ParameterSlices | None = None
    learns: bool = False


def load(
    cls: type[Model],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    options: Options,
) -> tuple[Model, dict[str, Any]]:
    """Load a model of class `cls` and report mismatches; see `from_pretrained`."""
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


def config_of(
    cls: type[ModelCore],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
) -> PreTrainedConfig:
    """Return the config that `from_pretrained` would load the model with."""
    root = None if source is None else source.locate(weights=False)
    return _config(cls, source, root, given, _effective(overrides))


def _load(
    cls: type[Model],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    options: Options,
) -> tuple[Model, dict[str, Any]]:
    overrides = _effective(overrides)
    world = options.world
    device_map = options.device_map if world is None else world.device
    first = first_device(device_map)
    with Together(world, "before it read weights") as checked:
        root = None
        if source is not None:
            fetch = partial(source.locate, weights=options.state_dict is None)
            root = in_turn(fetch, f"fetching {source.name_or_path}") if world else fetch()

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
            stored_as=request.source,
            ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        )
        mapping.difference.raise_if_incomplete(where)
        model.drop(mapping.optional)
        scheme, stored_scheme = request.scheme(mapping.formats), request.target
        # Rows of what is held in fewer bits are no parameters.
        slices = None if scheme is not None else options.slices
        own = None if world is None else OwnPart(model, world, target, slices)
        slots: dict[str, Slot] = {}
        if scheme is not None:
            slots = model.quantize_modules(scheme, target, divided=own is not None)
        if own is not None:
            own.check(slots)
            stored_scheme = None if stored_scheme is None else stored_scheme.divided(request.source)
        model_parts = parts(model, target, model.keep_in_fp32)
        placement = place(device_map, model_parts, options.max_memory)
        if device_map is not None:
            log.info("%s: %s", where, placement.in_words(model_parts))
        loader = WeightLoader(model, target, placement.device_of, slots)
        if own is not None:
            loader.shards, loader.local_names, loader.copies = (
                own.shards,
                own.local_names,
                options.learns,
            )
        if world is not None and mapping.fresh:
            checked.note = torch.get_rng_state()
    if log.isEnabledFor(logging.INFO):
        counts = number_formats(mapping, weights.tensors, slots, loader.dtype_of)
        log.info("%s: %s", where, in_words(counts))
    with Together(world, "while it read weights"):
        load_weights(loader, mapping, weights, where, checked.notes[0])
        model.tie_weights()
        if own is not None:
            own.finish(model)
        check_filled(model)
    hold_in_large_pages([*model.parameters(), *model.buffers()])
    dispatch_model(model, placement, model_parts)
    if placement.several:
        model.hf_device_map = dict(placement.devices)
    model.note_quantization(None if scheme is None else stored_scheme)
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
    """Write the weights and their companion files; see `PreTrainedModel.save_pretrained`.

    Args:
        tensors: named as in the model.
        files: named as on disk already.
    """
    named = {**dict(split_tensors(tensors, stacks)), **files}
    save(Path(directory), named, max_shard_size=max_shard_size, variant=variant, text_files=texts)


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
        remaining = dict(overrides)
        if (attention := remaining.pop("attn_implementation", None)) is not None:
            replaced.attn_implementation = attention
        if remaining:
            raise InputError(
                f"{', '.join(remaining)}: give either a config or keys to replace in the "
                "checkpoint's"
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
    """Return whether a tensor belongs to a prediction layer, which classifiers do not have."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    first, prediction_layers = (
        config.num_hidden_layers,
        vars(config).get("num_nextn_predict_layers") or 0,
    )
    return found is not None and first <= int(found[1]) < first + prediction_layers


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
    """Return the arguments that differ from their defaults."""
    return {
        key: value
        for key, value in given.items()
        if key not in WITHOUT_EFFECT
        and not (key in ABSENT and is_default(value))
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
}
OPTIONS = (
    *("cache_dir", "config", "device_map", "device_mesh", "distributed_config", "dtype"),
    *("gguf_file", "ignore_mismatched_sizes", "key_mapping", "local_files_only"),
    *("output_loading_info", "revision", "state_dict", "subfolder", "token", "tp_plan"),
    *("tp_size", "variant"),
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
