"""A model becomes one file in GGUF, for llama.cpp, Ollama and LM Studio."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quintet.auto import AutoConfig, AutoTokenizer
from quintet.configuration.base import PreTrainedConfig
from quintet.conversion import Converted, open_source
from quintet.errors import CheckpointError, InputError, ModelNotFoundError, TokenizerError
from quintet.exporting.keys import ARCHITECTURES, config_metadata, read_otherwise
from quintet.exporting.places import TensorPlace, kind_of, places_of
from quintet.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from quintet.gguf.cursor import Value
from quintet.gguf.types import BY_NAME, BlockType
from quintet.gguf.writing import Entry, GGUFWriter
from quintet.ops.block_encoding import encode_blocks
from quintet.tokenization.gguf_metadata import gguf_metadata

# The types there are, and the number that files have for one that is mostly of it.
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16"}
# Weights that are encoded at once.
_AT_ONCE = 4_000_000


def export_gguf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, dtype: str = "auto"
) -> Converted:
    """Write the model in directory `source`, or in a GGUF file, into a GGUF file.

    With it go its tokenizer, chat templates and what ends an answer. A directory without a
    tokenizer makes a file without one. What llama.cpp reads otherwise is warned of.

    Args:
        dtype: "F32", "F16", "BF16", "Q8_0" or "Q4_0"; "auto" is the one the weights have, or
            BF16. Vectors, norms and routers are always F32; Q4_0 leaves the head in Q8_0.

    Raises:
        InputError: the target is the source or does not end in .gguf, or the type is unknown.
        UnsupportedModelError: llama.cpp cannot run the model, or not part texts as it does.
        CheckpointError: the source is damaged, or a number in it is not finite.
        SaveError: writing failed; what was at `target` before is untouched.
    """
    root, path = Path(source), Path(target)
    if path.suffix != ".gguf" or path.is_dir():
        raise InputError(f"{path} has to be the name of a file that ends in .gguf")
    if path.exists() and root.samefile(path):
        raise InputError(f"{path} is the source itself; write into another file")
    own = AutoConfig.from_pretrained(root)
    # What was in fewer bits is not rounded between.
    fewer = vars(own).get("quantization_config") is not None
    opened = open_source(root, quantize="none", dtype="float32" if fewer else "auto")
    config, weights = opened.config, opened.weights
    for difference in read_otherwise(config):
        warnings.warn(difference, stacklevel=2)
    values = vars(config)
    wanted = _type(dtype, own.torch_dtype)
    metadata = {
        **_general(root, config, wanted),
        **config_metadata(config),
        **_tokenizer(root, config),
    }
    tied = bool(values.get("tie_word_embeddings"))
    places = {name: places_of(name, shape, values) for name, shape in weights.shapes().items()}
    entries: dict[str, Entry] = {}
    for place in (place for found in places.values() for place in found):
        kind = kind_of(place.name, place.shape, wanted, tied=tied)
        entries[place.name] = Entry(place.name, place.shape, kind)
    with GGUFWriter(path, metadata, entries.values()) as writer:
        for name, tensor in weights.stream():
            for place in places[name]:
                _write(writer, place, entries[place.name].kind, place.take(tensor))
    left_out = (*opened.lost, *(name for name, found in places.items() if not found))
    return Converted(weights.read, sum(entry.nbytes for entry in entries.values()), left_out)


def _type(dtype: str, own: torch.dtype | None) -> BlockType:
    if dtype == "auto":
        return BY_NAME["BF16" if own is None else _OF_DTYPE.get(own, "BF16")]
    if dtype.upper() not in GGUF_TYPES:
        raise InputError(
            f"dtype={dtype!r} cannot be written in GGUF; there are {', '.join(GGUF_TYPES)}, and "
            "llama-quantize makes more of one in BF16"
        )
    return BY_NAME[dtype.upper()]


def _general(root: Path, config: PreTrainedConfig, wanted: BlockType) -> dict[str, Value]:
    name = root.stem if root.is_file() else root.resolve().name
    return {
        "general.architecture": ARCHITECTURES.get(config.model_type, config.model_type),
        "general.type": "model",
        "general.name": name,
        "general.file_type": GGUF_TYPES[wanted.name],
        "general.quantization_version": 2,
    }


def _tokenizer(root: Path, config: PreTrainedConfig) -> dict[str, Value]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(root)
    except (ModelNotFoundError, TokenizerError) as error:
        warnings.warn(f"the file will have no tokenizer: {error}", stacklevel=3)
        return {"tokenizer.ggml.model": "no_vocab"}
    return gguf_metadata(tokenizer, config.vocab_size, _ends(root, config))


def _ends(root: Path, config: PreTrainedConfig) -> Sequence[int]:
    """Return the ids of tokens that end an answer."""
    ends: Any = config.eos_token_id
    if root.is_file() or (root / GENERATION_CONFIG_NAME).is_file():
        ends = GenerationConfig.from_pretrained(root).eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def _write(writer: GGUFWriter, place: TensorPlace, kind: BlockType, tensor: Tensor) -> None:
    """Encode some rows at a time, and put them where they belong."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    row_bytes = rows.shape[1] // kind.weights * kind.nbytes
    start = (place.slice or 0) * rows.shape[0] * row_bytes
    step = max(1, _AT_ONCE // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        some = rows[first : first + step]
        data = encode_blocks(some, kind)
        # What is too large for half precision shows in what came of it.
        written = data.view(torch.float16) if kind.name == "F16" else some
        if not written.isfinite().all():
            raise CheckpointError(
                f"{place.name} has a number that is not finite in {kind.name}; "
                + ("take BF16 or F32" if some.isfinite().all() else "the checkpoint is damaged")
            )
        writer.write(place.name, start + first * row_bytes, data.numpy().tobytes())
