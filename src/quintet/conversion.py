"""Converts a checkpoint: quantised, dequantised, another dtype, other shards.

Tensors go through one by one, so that no more than those of one file are in memory.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quintet.auto import AutoConfig, AutoTokenizer, family
from quintet.checkpoint import (
    Checkpoint,
    GGUFCheckpoint,
    StackPiece,
    open_weights,
    pieces,
    read_consistently,
    save_stream,
)
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, TokenizerError, UnsupportedModelError
from quintet.files import MAX_LISTING_BYTES, copy_file, read_text
from quintet.folder import CONFIG_NAME
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.hub import TOKENIZER_PATTERNS
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.key_mapping import KeyMapping, map_keys
from quintet.modeling.placement import named_dtype
from quintet.modeling.progress import progress_bar
from quintet.quantization import (
    EncodedWeight,
    GroupFormat,
    Int4Format,
    QuantizationConfig,
    Slot,
    WeightFormat,
    cut,
    read,
    resolve_quantization,
)
from quintet.quantization.calibration import MatrixPlace, rounded
from quintet.quantization.formats import Parts


@dataclass(frozen=True, slots=True)
class Converted:
    """The bytes and names that a conversion wrote.

    Attributes:
        read: bytes of weights that were read.
        written: bytes of weights that were written.
        left_out: tensors of the source that the model has no place for.
        numbers: how many weights those bytes are; 0 where that was not counted.
    """

    read: int
    written: int
    left_out: tuple[str, ...]
    numbers: int = 0


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    quantization_config: QuantizationConfig | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    calibrate: Iterable[Tensor] = (),
) -> Converted:
    """Write the model in directory `source` into directory `target`, whole or not at all.

    Names become those of a release: with the prefix of the class that was saved, and an entry for
    each expert, however the source has them.

    Args:
        quantize: as in `from_pretrained`; None leaves a quantised model as it is.
        quantization_config: the same with options.
        dtype: of what is not quantised; "auto" is the one of the source.
        calibrate: ids (B, T) of a text like those that the model is for, by which 4-bit weights are
            rounded (`quintet.quantization.calibration`). All of the model is in memory for that.

    Raises:
        InputError: source and target are one directory, an option does not exist, or nothing is
            rounded to 4 bits that could be calibrated.
        CheckpointError: the source is damaged, or a weight in it is not finite.
        SaveError: writing failed; what was in `target` before is untouched.
    """
    root, target = Path(source), Path(target)
    if target.exists() and root.samefile(target):
        raise InputError(f"{target} is the source itself; write into another directory")
    source_model = open_source(
        root, quantize=quantize, quantization_config=quantization_config, dtype=dtype
    )
    config, weights = source_model.config, source_model.weights
    if batches := list(calibrate):
        weights.rounded = _rounded(root, weights, batches)
    # Before modules are replaced by those that hold other tensors.
    numbers = weights.model.num_parameters()
    texts = {CONFIG_NAME: config.to_json_string(), **_texts_of_file(root)}
    if (root / GENERATION_CONFIG_NAME).is_file():
        texts[GENERATION_CONFIG_NAME] = read_text(root / GENERATION_CONFIG_NAME)
    others = [path for pattern in TOKENIZER_PATTERNS for path in root.glob(pattern)]
    for path in others:
        if path.parent == root and path.suffix in (".json", ".txt", ".jinja"):
            texts[path.name] = read_text(path, MAX_LISTING_BYTES)
    save_stream(target, weights.stream(), max_shard_size=max_shard_size, text_files=texts)
    for path in others:
        if path.name not in texts:
            copy_file(path, target / path.relative_to(root))
    return Converted(weights.read, weights.written, source_model.lost, numbers)


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model to be written in another form; its weights are not read yet.

    Attributes:
        config: as it will be; it says nothing of how the source holds its weights.
        weights: a stream of them, by the names of a release.
        lost: tensors of the source that the model has no place for.
    """

    config: PreTrainedConfig
    weights: "WeightStream"
    lost: tuple[str, ...]


def open_source(
    root: Path,
    *,
    quantize: str | None = None,
    quantization_config: QuantizationConfig | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
) -> SourceModel:
    """Open the model in a directory or GGUF file for conversion; see `convert`.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    config, checkpoint = read_consistently(
        root, lambda: (AutoConfig.from_pretrained(root), open_weights(root))
    )
    found = family(config.model_type)
    model = init_on_meta(found.find(_suffix(config.architectures, found.prefix)), config)
    # Not a device that multiplies FP8 but a file is written to: it may stay as it is.
    stored = vars(config).get("quantization_config")
    given = stored if quantize is None and quantization_config is None else quantization_config
    request = resolve_quantization(stored, quantize, given, torch.device("cpu"))
    mapping = map_keys(model, checkpoint.tensors, stored_as=request.source)
    mapping.difference.raise_if_incomplete(str(root))
    kept_dtype = config.torch_dtype or torch.bfloat16 if dtype == "auto" else named_dtype(dtype)
    scheme = request.scheme(mapping.formats)

    config.architectures = [type(model).__name__]
    config.dtype = str(kept_dtype).removeprefix("torch.")
    vars(config).pop("quantization_config", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    slots = {} if scheme is None else model.quantize_modules(scheme, kept_dtype)
    weights = WeightStream(model, mapping, checkpoint, shapes, slots, kept_dtype)
    if request.target is not None and scheme is not None:
        quantised = weights.quantised()
        plain = [
            name
            for name, shape in weights.shapes().items()
            if len(shape) == 2 and name not in quantised and "embed" not in name
        ]
        # A head that is tied has no tensor of its own, and is read as a matrix all the same.
        plain += [f"{path}.weight" for path in model.maps_in_numbers()]
        settings = request.target.described(quantised, dict.fromkeys(plain))
        vars(config)["quantization_config"] = settings
    return SourceModel(config, weights, tuple(mapping.lost))


def _rounded(
    root: Path, weights: "WeightStream", batches: Sequence[Tensor]
) -> dict[MatrixPlace, list[Parts]]:
    """Round the matrices of 4 bits with a text in view."""
    slots = {}
    for name, slot in weights.slots.items():
        wanted, stored = slot.module.formats[slot.name].parts_of, weights.mapping.formats.get(name)
        shape, _ = slot.module.matrices[slot.name]
        # What the source has in that very form is not rounded.
        same = stored is not None and stored.parts(shape) == wanted.parts(shape)
        if isinstance(wanted, Int4Format | GroupFormat) and not same:
            slots[name] = slot
    if not slots:
        raise InputError(
            "calibrate is for weights of 4 bits, in quantize='int4' or PackedConfig(bits=4), and "
            "nothing is rounded to them here"
        )
    model = type(weights.model).from_pretrained(root, quantize="none", dtype=weights.dtype)
    found = {}
    with progress_bar("calibrating", len(slots)) as bar:
        for place, parts in rounded(model, slots, batches):
            found[place] = parts
            bar.update(place.expert in (None, 0))
    stacks = {place.name for place in found if place.expert is not None}
    experts = {name: slots[name].module.matrices[slots[name].name][1][0] for name in stacks}
    missed = sum(MatrixPlace(name, e) not in found for name, E in experts.items() for e in range(E))
    if missed:
        warnings.warn(
            f"no token of the text came to {missed} of {sum(experts.values())} matrices of "
            "experts, which are rounded without it; a longer text comes to more",
            stacklevel=3,
        )
    return found


def _texts_of_file(root: Path) -> dict[str, str]:
    """Return the text files that a GGUF file stands for; none for a directory."""
    if not root.is_file():
        return {}
    generation = GenerationConfig.from_pretrained(root)
    texts = {GENERATION_CONFIG_NAME: generation.to_json_string()}
    try:
        return {**texts, **AutoTokenizer.from_pretrained(root).to_files()}
    except (TokenizerError, UnsupportedModelError) as error:
        warnings.warn(f"no tokenizer is written: {error}", stacklevel=3)
        return texts


@dataclass(slots=True)
class WeightStream:
    """Streams a model's tensors from one checkpoint into another."""

    model: PreTrainedModel
    mapping: KeyMapping
    checkpoint: Checkpoint | GGUFCheckpoint
    whole: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Slot]
    dtype: torch.dtype
    rounded: Mapping[MatrixPlace, list[Parts]] = field(default_factory=dict)
    read: int = 0
    written: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors to come, if none is quantised."""
        return {to.name: to.shape for _, to in self._pieces()}

    def quantised(self) -> dict[str, tuple[WeightFormat, tuple[int, ...]]]:
        """Return format and shape of each quantised matrix to come."""
        slots = ((self.slots[name], to) for name, to in self._pieces() if name in self.slots)
        return {to.name: (slot.module.formats[slot.name], to.shape) for slot, to in slots}

    def _pieces(self) -> Iterator[tuple[str, StackPiece]]:
        wanted = dict.fromkeys(name for name, _ in self.mapping.wanted.values())
        for name in wanted:
            for to in pieces(name, self.whole[name], self.model.expert_stacks):
                yield name, to

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the new checkpoint by name."""
        stacks, shapes, slots = self.model.expert_stacks, self.whole, self.slots
        sizes = {
            name: sum(self.checkpoint.tensors[file].nbytes for file, _ in one.files.values())
            for name, one in self.mapping.stored.items()
        }
        with progress_bar("converting", sum(sizes.values())) as bar:
            for in_file, weight in read(self.checkpoint, self.mapping.stored):
                name, piece = self.mapping.wanted[in_file]
                for to in pieces(name, shapes[name], stacks):
                    if piece.place is None or piece.place == to.place:
                        part = self._rounded(name, to) or _part(weight, piece, to)
                        for named in self._converted(part, to, slots.get(name), in_file):
                            self.written += named[1].nbytes
                            yield named
                self.read += sizes[in_file]
                bar.update(sizes[in_file])

    def _rounded(self, name: str, to: StackPiece) -> EncodedWeight | None:
        """Return a piece that was rounded with a text in view."""
        expert, rows = (None, slice(0)) if to.place is None else to.place
        parts = self.rounded.get(MatrixPlace(name, expert))
        if parts is None:
            return None
        slot = self.slots[name]
        own = parts[(rows.start or 0) // to.shape[0]]
        return EncodedWeight(slot.module.formats[slot.name], own, to.shape)

    def _converted(
        self, weight: Tensor | EncodedWeight, to: StackPiece, slot: Slot | None, source: str
    ) -> Iterator[tuple[str, Tensor]]:
        if slot is not None:
            weight_format = slot.module.formats[slot.name]
            parts = slot.encoded(weight, source)
            yield from weight_format.pack(to.name, parts, to.shape, self.dtype).items()
            return
        exact = to.name.endswith(self.model.keep_in_fp32)
        dtype = torch.float32 if exact else self.dtype
        if isinstance(weight, EncodedWeight):
            weight = weight.checked(source).decode(dtype)
        yield to.name, weight.to(dtype) if weight.is_floating_point() else weight


def _part(
    weight: Tensor | EncodedWeight, piece: StackPiece, to: StackPiece
) -> Tensor | EncodedWeight:
    """Cut the tensor of one piece out of a tensor that was read."""
    if to.place is None or piece.place is not None:
        return weight
    expert, rows = to.place
    whole: Tensor | EncodedWeight
    whole = weight[expert] if isinstance(weight, Tensor) else weight.slice(expert)
    height = to.shape[0]
    return cut(whole, to.shape, whole.shape[0] // height)[int(rows.start) // height]


def _suffix(architectures: list[str] | None, prefix: str) -> str:
    for name in architectures or ():
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return "ForCausalLM"
