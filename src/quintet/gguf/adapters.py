"""Adapters in GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes them: W + alpha / r · B A.

`blk.3.attn_q.weight.lora_a` (r, I) and `.lora_b` (O, r) are of one matrix; those of a layer's
experts are stacked, (E, r, I) and (E, O, r), and an embedding's A is transposed, (V, r). Rows of
queries and keys of the architecture `llama` are in the order of pairs, in B as in a model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quintet.errors import CheckpointError, UnsupportedModelError, listed, shown
from quintet.gguf.config import base_of
from quintet.gguf.container import GGUFFile, GGUFTensor, read_gguf
from quintet.gguf.names import LAYER, OUTSIDE
from quintet.gguf.values import Values

# The model types that an architecture's adapters are of.
MODEL_TYPES: Mapping[str, tuple[str, ...]] = {
    "qwen2": ("qwen2",),
    "llama": ("qwen2",),
    "qwen2moe": ("qwen2_moe",),
    "deepseek2": ("deepseek_v2", "deepseek_v3"),
}
# Where matrices have another number of rows and columns than the maps they are of.
_NOT_MAPS = ("attn_k_b", "attn_v_b")
MAX_EXPERTS = 100_000
_PAIR = re.compile(r"(?P<base>.+)\.lora_(?P<which>[ab])")
_BLOCK = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<what>.+)\.weight")
_EXPERTS = re.compile(r"ffn_(?P<which>gate|up|down)_(?P<of>exps|shexp)")
_NORM = re.compile(r".*_norm\.weight")


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """The two tensors of a matrix's addition.

    Attributes:
        path: of the map in a release; of stacked experts, without the expert's number.
        part: which map of an expert; None where these are no experts'.
        paired: the key of how many heads have B's rows in the order of pairs; None for none.
        embeds: whether it is an embedding's.
    """

    path: str
    a: GGUFTensor
    b: GGUFTensor
    part: str | None = None
    paired: str | None = None
    embeds: bool = False

    @property
    def experts(self) -> int:
        """How many experts there are; 0 where these are no experts'."""
        return self.a.shape[0] if self.part else 0

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.b.shape[-1]


@dataclass(frozen=True, slots=True)
class GGUFAdapter:
    """An adapter's file.

    Attributes:
        architecture: of the model that it is of.
        alpha: what the scale is counted from; 0 for a scale of 1.
        base: the model that it was trained on, if the file says so.
        norms: the tensors of norms beside it, which llama.cpp reads over.
    """

    file: GGUFFile
    architecture: str
    alpha: float
    base: str | None
    matrices: tuple[AdaptedMatrix, ...]
    norms: tuple[str, ...]


def read_gguf_adapter(path: Path) -> GGUFAdapter:
    """Read and check the head of an adapter's file.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: it is damaged, no adapter, or has tensors without a place.
        UnsupportedModelError: an adapter of another kind, or of an architecture that is not here.
    """
    file = read_gguf(path)
    general = Values(file.path, file.metadata)
    if (kind := general.text("general.type", "model")) != "adapter":
        raise CheckpointError(f"{path} is no adapter (general.type={shown(kind)})")
    if (kind := general.text("adapter.type", "")) != "lora":
        raise UnsupportedModelError(
            f"{path} is an adapter of another kind (adapter.type={shown(kind)}) than lora, the "
            "one that is read"
        )
    if "adapter.alora.invocation_tokens" in general:
        raise UnsupportedModelError(
            f"{path} works from certain tokens on (adapter.alora.invocation_tokens), which is not "
            "here"
        )
    architecture = general.text("general.architecture", "") or ""
    if architecture not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{path} is of the architecture {shown(architecture)}, which is not supported; there "
            f"are {', '.join(MODEL_TYPES)}"
        )
    pairs, norms = _pairs(file)
    matrices = tuple(_matrices(file, architecture, pairs))
    alpha = general.number("adapter.lora.alpha", 0.0) or 0.0
    return GGUFAdapter(file, architecture, alpha, base_of(general), matrices, norms)


def _pairs(file: GGUFFile) -> tuple[dict[str, dict[str, GGUFTensor]], tuple[str, ...]]:
    pairs: dict[str, dict[str, GGUFTensor]] = {}
    norms, unknown = [], []
    for name, tensor in file.tensors.items():
        if found := _PAIR.fullmatch(name):
            pairs.setdefault(found["base"], {})[found["which"]] = tensor
        elif _NORM.fullmatch(name):
            norms.append(name)
        else:
            unknown.append(name)
    alone = [
        f"{base}.lora_{'a' if 'b' in own else 'b'}" for base, own in pairs.items() if len(own) < 2
    ]
    if unknown or alone:
        fault = "has tensors that no adapter has" if unknown else "lacks"
        raise CheckpointError(f"{file.path} {fault}:\n{listed(unknown or alone)}")
    return pairs, tuple(norms)


def _matrices(
    file: GGUFFile, architecture: str, pairs: Mapping[str, Mapping[str, GGUFTensor]]
) -> Iterator[AdaptedMatrix]:
    unknown = []
    for base, own in pairs.items():
        found = _matrix(base, architecture, own["a"], own["b"])
        if found is None:
            unknown.append(base)
            continue
        axes = 3 if found.part else 2
        if {len(found.a.shape), len(found.b.shape)} != {axes} or found.experts > MAX_EXPERTS:
            raise CheckpointError(
                f"{file.path}: {base} is changed by {list(found.a.shape)} and "
                f"{list(found.b.shape)}, which have to have {axes} axes"
            )
        yield found
    if unknown:
        raise CheckpointError(
            f"{file.path} changes {len(unknown)} matrices that a model of the architecture "
            f"{architecture} has no place for:\n{listed(unknown)}"
        )


def _matrix(base: str, architecture: str, a: GGUFTensor, b: GGUFTensor) -> AdaptedMatrix | None:
    if base in OUTSIDE:
        path = OUTSIDE[base].removesuffix(".weight")
        return AdaptedMatrix(path, a, b, embeds=base.startswith("token_embd"))
    block = _BLOCK.fullmatch(base)
    if block is None:
        return None
    layer, module = f"model.layers.{int(block['layer'])}.", block["what"]
    if experts := _EXPERTS.fullmatch(module):
        part = f"{experts['which']}_proj"
        if experts["of"] == "exps":
            return AdaptedMatrix(f"{layer}mlp.experts", a, b, part)
        shared = "shared_expert" if architecture == "qwen2moe" else "shared_experts"
        return AdaptedMatrix(f"{layer}mlp.{shared}.{part}", a, b)
    if module not in LAYER or module in _NOT_MAPS:
        return None
    paired = None
    if architecture == "llama":
        paired = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(module)
    return AdaptedMatrix(layer + LAYER[module], a, b, paired=paired)
