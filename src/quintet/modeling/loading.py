"""From a directory or hub id to a model, and back: the one place that composes the parts.

The model is built without memory, names and shapes are compared with the checkpoint's headers,
and only then is data read, one tensor after the other.
"""

import difflib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quintet.checkpoint import (
    Checkpoint,
    Piece,
    StackExperts,
    TensorInfo,
    compare,
    pieces,
    save,
    split_tensors,
)
from quintet.configuration.base import PreTrainedConfig, read_config
from quintet.errors import CheckpointError, InputError, listed
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.hub import CONFIG_PATTERNS, WEIGHT_PATTERNS, locate
from quintet.modeling.placement import DeviceMap, named_dtype, single_device
from quintet.quantization import Encoded, QuantizationConfig, Request, read, requested, stored

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
    quantize: str | None,
    quantization_config: QuantizationConfig | Mapping[str, Any] | None,
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
    request = requested(
        vars(config).get("quantization_config"), quantize, quantization_config, device
    )
    checkpoint = Checkpoint.open(root)
    target = _target_dtype(dtype, config, checkpoint.tensors)

    with torch.device("meta"):
        model = cls(config)
    _fill(model, checkpoint, str(root), target, device, request)
    model.to(device)
    model.note_quantization(request.target)
    config.dtype = str(target).removeprefix("torch.")
    if (root / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(root)
    return model.eval()


def write(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, Tensor],
    *,
    rules: Sequence[StackExperts],
    max_shard_size: int | str,
    texts: Mapping[str, str],
) -> None:
    """Write weights and the files beside them; see `PreTrainedModel.save_pretrained`.

    Args:
        tensors: named as in the model.
        files: named as on disk already.
    """
    named = {**dict(split_tensors(tensors, rules)), **files}
    save(Path(directory), named, max_shard_size=max_shard_size, text_files=texts)


def _fill(
    model: "PreTrainedModel",
    checkpoint: Checkpoint,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    request: Request,
) -> None:
    """Give every parameter and persistent buffer of a meta model its tensor."""
    tied, optional = model.tied_names(), model.optional_names(checkpoint.tensors)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(optional)
    }
    plan = _plan(model, expected, checkpoint.tensors)
    fresh = [
        name
        for name in expected
        if name.startswith(model.new_head) and plan[name][0].name not in checkpoint.tensors
    ]
    wanted = {
        piece.name: (name, piece)
        for name, parts in plan.items()
        for piece in parts
        if name not in fresh
    }
    there = stored(
        {k: piece.shape for k, (_, piece) in wanted.items()}, checkpoint.tensors, request.source
    )
    files = dict(file for one in there.values() for file in one.files.values())
    found = {name: info for name, info in checkpoint.tensors.items() if name in files}
    compare(files, found).raise_if_incomplete(where)
    slots = {} if request.scheme is None else model.quantize_modules(request.scheme, dtype)

    # Before reading: a head may be there in part, and what is read must stay.
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fresh):
        head = model.get_submodule(path)
        for leaf, parameter in list(head.named_parameters(recurse=False)):
            _assign(head, leaf, torch.empty_like(parameter, dtype=dtype, device=device))
        model.init_module(head)
    tensors = dict(model.state_dict(keep_vars=True))
    for in_file, weight in read(checkpoint, there):
        name, piece = wanted[in_file]
        if not isinstance(weight, Encoded):
            _check_dtype(in_file, weight.dtype)
        if name in slots:
            slots[name].take(weight, piece.place, device, in_file)
            continue
        target = torch.float32 if name.endswith(model.keep_in_fp32) else dtype
        tensor = weight.decode(target) if isinstance(weight, Encoded) else weight
        if piece.place is None:
            _assign(model, name, tensor.to(device, target))
        else:
            if tensors[name].is_meta:
                tensors[name] = torch.empty(expected[name], dtype=target, device=device)
                _assign(model, name, tensors[name])
            # Converted on the way into its place: no expert is ever there twice.
            piece.of(tensors[name]).copy_(tensor)
    model.drop(optional)
    model.tie_weights()
    _tell(model, where, fresh, set(checkpoint.tensors) - set(files))


def _plan(
    model: "PreTrainedModel",
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, list[Piece]]:
    """Say for each tensor of the model which of the checkpoint fill it.

    The checkpoint may be with or without a head, and may hold experts stacked already.
    """
    own = f"{model.base_model_prefix}." if model.base_model is not model else ""
    inner = [name.removeprefix(own) for name in expected if name.startswith(own)]
    prefixes = dict.fromkeys((own, "", "model.", "transformer."))
    prefix = max(prefixes, key=lambda p: sum(p + name in tensors for name in inner))
    plan = {}
    for name, shape in expected.items():
        named = prefix + name.removeprefix(own) if name.startswith(own) else name
        plan[name] = (
            [Piece(named, shape)] if named in tensors else pieces(named, shape, model.weight_rules)
        )
    # A file may hold a tied tensor under another of its names alone.
    for alias, name in model.tied_names().items():
        named = prefix + alias.removeprefix(own) if alias.startswith(own) else alias
        if plan[name][0].name not in tensors and named in tensors:
            plan[name] = [Piece(named, expected[name])]
    return plan


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        module.register_buffer(leaf, tensor)


def _check_dtype(name: str, saved: torch.dtype) -> None:
    if not saved.is_floating_point or saved.itemsize == 1:
        raise CheckpointError(
            f"{name} is stored as {saved}, which says nothing without the quantization_config that "
            "config.json lacks; use a copy of the model in bfloat16"
        )


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
    tied = tuple(alias.removeprefix(f"{model.base_model_prefix}.") for alias in model.tied_names())
    lost = sorted(n for n in left if not n.startswith(known_heads) and not n.endswith(tied))
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
        if key in ABSENT:
            raise InputError(f"{key}: {ABSENT[key]} is not in this version")
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *OPTIONS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"from_pretrained has no option {key!r}, and {cls.config_class.__name__} "
                f"no key of that name{hint}"
            )


# What Transformers takes, and people will try.
ABSENT = {
    "load_in_8bit": "quantisation outside of quantization_config=BitsAndBytesConfig(...)",
    "load_in_4bit": "quantisation outside of quantization_config=BitsAndBytesConfig(...)",
    "output_loading_info": "a report beside the model",
    "ignore_mismatched_sizes": "loading a model in part",
    "key_mapping": "renaming tensors",
    "state_dict": "loading from memory (use model.load_state_dict)",
    "variant": "choosing a variant of the files",
    "max_memory": "placing a model on several devices",
    "offload_folder": "offloading",
    "tp_plan": "tensor parallelism",
}
OPTIONS = ("cache_dir", "config", "device_map", "dtype", "local_files_only", "revision", "token")


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
