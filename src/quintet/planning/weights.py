"""The weights of a model: each matrix and vector, and a device's part."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quintet.auto import family
from quintet.checkpoint import TensorInfo
from quintet.configuration import PreTrainedConfig
from quintet.errors import InputError, shown
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.key_mapping import map_keys
from quintet.parallel.placement import Place, cuts_of, shard_of, table_of
from quintet.planning.devices import Device
from quintet.quantization import WeightFormat
from quintet.quantization.formats import FP8Format
from quintet.quantization.request import SHORT, QuantizationRequest, read
from quintet.sharding import WHOLE, Axis, Cut

Tensors = Mapping[str, TensorInfo]
# By the first pattern found in its name; what comes behind the last layer is a kind by itself.
_KINDS = (
    (r"(embed_tokens|lm_head|shared_head\.head)\.", "embedding and head"),
    (r"\.experts\.", "routed experts"),
    (r"\.shared_experts?\.", "shared experts"),
    (r"self_attn\.(q_a_|kv_a_)", "attention, whole"),
    (r"self_attn\.", "attention"),
    (r"\.mamba\.", "mamba"),
    (r"mlp\.(gate|up|down)_proj|feed_forward\.", "dense"),
    (r"", "norms, routers"),
)
EMBEDDING, ROUTED = "embedding and head", "routed experts"
PREDICTION = "prediction layers"
KINDS = (*(kind for _, kind in _KINDS), PREDICTION)


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix, a vector, or the stacked matrices of experts.

    Attributes:
        name: of the parameter, its first.
        shape: of its numbers.
        dtype: of plain numbers.
        format: in which a matrix is held; None for plain numbers.
        kind: one of KINDS.
        layers: those that have it; none for what is before or behind all of them.
        uses: how often a token's forward multiplies with it, an expert's as if chosen.
        cuts: how devices share it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: WeightFormat | None
    kind: str
    layers: tuple[int, ...]
    uses: float
    cuts: tuple[Cut, ...]

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def local(self, counts: Mapping[Axis, int]) -> tuple[int, ...]:
        """Return the shape of one device's part.

        Raises:
            InputError: devices cannot share it evenly, or blocks with one scale would be cut.
        """
        # The first has the most: only what is uneven is less on the last.
        first = Place(**{axis: (0, count) for axis, count in counts.items()})
        shard = shard_of(self.name, self.shape, self.cuts, first)
        if self.format is not None and not shard.whole and self.format.shards(shard) is None:
            split = ", ".join(f"{axis}={count}" for axis, count in counts.items() if count > 1)
            raise InputError(
                f"{re.sub(r'[0-9]+', '*', self.name)} is held in {self.format.name}, whose blocks "
                f"{split} would cut"
            )
        return shard.local_shape

    def resized(self, experts: int) -> "Weight":
        """Return a stack of other many experts."""
        section = replace(self.cuts[0].sections[0], count=experts)
        cuts = (replace(self.cuts[0], sections=(section,)), *self.cuts[1:])
        return replace(self, shape=(experts, *self.shape[1:]), cuts=cuts)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a part of it, scales and offsets included."""
        if self.format is None:
            return math.prod(shape) * self.dtype.itemsize
        *stack, rows, columns = shape
        halves = 2 if stack and self.name.endswith("gate_up_proj") else 1
        specs = self.format.parts((rows // halves, columns)).values()
        matrix_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
        return math.prod(stack) * halves * matrix_bytes


def quantization_on(
    config: PreTrainedConfig, quantize: str | None, device: Device
) -> QuantizationRequest:
    """Return the quantisation of a model on a device.

    Files in FP8 become plain numbers where a device multiplies no FP8, as when they are loaded.

    Raises:
        InputError: a `quantize` that does not exist, or FP8 on a device without.
    """
    settings = vars(config).get("quantization_config")
    source = read(settings) if settings else None
    if quantize is not None:
        if quantize not in SHORT:
            raise InputError(f"quantize={shown(quantize)} has to be one of {', '.join(SHORT)}")
        if quantize == "fp8" and device.fp8 is None:
            raise InputError(
                f"quantize='fp8' is for devices that multiply FP8, which {device.name} does not; "
                "use int8 or int4"
            )
        return QuantizationRequest(source, SHORT[quantize])
    if source is None:
        return QuantizationRequest(None, None)
    scheme = source.scheme()
    if device.fp8 is None and scheme is not None and isinstance(scheme.weights, FP8Format):
        return QuantizationRequest(source, None)
    return QuantizationRequest(source, source.ours(), keeps_fp8=device.fp8 is not None)


def on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without weights, its numbers plain."""
    model: PreTrainedModel = init_on_meta(family(config.model_type).find("ForCausalLM"), config)
    return model.to(dtype)


def weights_of(
    model: PreTrainedModel, request: QuantizationRequest, tensors: Tensors | None = None
) -> Sequence[Weight]:
    """Return all tensors of a model without weights, shared ones once.

    The model's modules are replaced by quantised ones where it is held so.

    Args:
        model: in plain numbers.
        request: how its matrices are to be held.
        tensors: of its files, where how they are held follows from what there is.
    """
    layers = model.config.num_hidden_layers
    dtype = model.dtype
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    blocks = {
        name: len(list(child.children()))
        for name, child in model.named_modules(remove_duplicate=False)
        if name.endswith("_adapter_list")
    }
    table = table_of(model)
    # What no checkpoint has is made on each device.
    beside = dict(model.named_buffers()).keys() - model.state_dict(keep_vars=True).keys()
    formats = _formats(model, request, tensors, dtype)
    # Prediction layers come last: embedding and head are theirs by a second name.
    order = sorted(named, key=lambda name: (layer_of(name) or 0) >= layers)
    firsts: dict[int, str] = {}
    uses: dict[str, float] = {}
    owners: dict[str, set[int]] = {}
    for name in order:
        first = firsts.setdefault(id(named[name]), name)
        uses[first] = uses.get(first, 0.0) + _uses(name, layers, blocks)
        layer = layer_of(name)
        owners.setdefault(first, set()).update(() if layer is None else (layer,))
    found = []
    for name in firsts.values():
        tensor = named[name]
        kind = next(kind for pattern, kind in _KINDS if re.search(pattern, name))
        owned = tuple(sorted(owners[name]))
        if kind == EMBEDDING:
            owned = ()
        elif owned and owned[0] >= layers:
            kind = PREDICTION
        exact = bool(model.keep_in_fp32) and name.endswith(model.keep_in_fp32)
        found.append(
            Weight(
                name,
                tuple(tensor.shape),
                torch.float32 if exact else tensor.dtype,
                formats.get(name),
                kind,
                owned,
                uses[name],
                WHOLE if name in beside else cuts_of(name, table),
            )
        )
    return found


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter's name is of."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _uses(name: str, layers: int, blocks: Mapping[str, int]) -> float:
    """Return the number of products per token with a weight under one of its names."""
    if (layer_of(name) or 0) >= layers or name.endswith(("embed_tokens.weight", ".inv_freq")):
        return 0.0
    adapters = re.match(r".*_adapter_list", name)
    # Each of the layers that share a block names all adapters, and uses its own.
    return 1.0 / blocks[adapters[0]] if adapters else 1.0


def _formats(
    model: PreTrainedModel,
    request: QuantizationRequest,
    tensors: Tensors | None,
    dtype: torch.dtype,
) -> dict[str, WeightFormat]:
    if request.target is None:
        return {}
    found = {} if tensors is None else map_keys(model, tensors, stored_as=request.source).formats
    scheme = request.target.scheme() if tensors is None else request.scheme(found)
    if scheme is None:
        return {}
    slots = model.quantize_modules(scheme, dtype)
    return {name: slot.module.formats[slot.name] for name, slot in slots.items()}
