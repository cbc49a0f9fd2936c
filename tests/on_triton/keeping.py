"""Inputs of `quintet.triton.keeping`: tokens of sequences in pages, and what they leave there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton import attention
from on_triton.cases import Case
from quintet.ops import keeping as ops
from quintet.triton.keeping import rotate_and_keep

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Scene:
    """Tokens of sequences, and what of them is rotated and kept.

    Attributes:
        where: the sequences and the memory they lie in; its sizes are those of a key and of what is
            kept beside.
        normed: whether that is normalised first.
        interleaved: whether neighbours are rotated together.
    """

    where: attention.Scene
    normed: bool = False
    interleaved: bool = False


def inputs(device: torch.device, *, scene: Scene) -> Mapping[str, Any]:
    where = scene.where
    g = torch.Generator().manual_seed(len(where.tokens) + sum(where.sizes))
    pages = where.pages(device, g)
    (H, K), (D, E) = where.heads, where.sizes
    N = int(pages.ends[-1]) + where.spare

    def vectors(heads: int, size: int) -> Tensor:
        # A slice of something wider, as a part of a projection is.
        return torch.randn(N, heads, size + 8, generator=g)[..., :size].to(device, where.dtype)

    angles = torch.rand(N, D // 2, generator=g).repeat(1, 2) * 6
    weight = torch.rand(E, generator=g).to(device, where.dtype) + 0.5
    return {
        "q": vectors(H, D),
        "k": vectors(K, D),
        "other": vectors(K, E),
        "cos": angles.cos().to(device, where.dtype),
        "sin": angles.sin().to(device, where.dtype),
        "memory": tuple(where.memory(s, K, pages, g).to(device, where.dtype) for s in (D, E)),
        "pages": pages,
        "norm": (weight, 1e-6) if scene.normed else None,
        "interleaved": scene.interleaved,
    }


def outcome(keep: Any, **given: Any) -> tuple[Tensor, ...] | None:
    """Return the queries, and memory behind that."""
    memory = tuple(x.clone(memory_format=torch.preserve_format) for x in given["memory"])
    turned = keep(**given | {"memory": memory})
    return None if turned is None else (turned, *memory)


def case(name: str, *tokens: tuple[int, int], compiles: bool = True, **more: Any) -> Case:
    own = {name: more.pop(name) for name in ("normed", "interleaved") if name in more}
    scene = Scene(attention.Scene(tokens, **more), **own)
    # The definition rounds each product.
    tolerance = {F32: 1e-6, BF16: 2**-7, F16: 2**-10}[scene.where.dtype]
    return Case(
        name,
        partial(outcome, rotate_and_keep),
        partial(outcome, ops.rotate_and_keep.definition),
        partial(inputs, scene=scene),
        tolerance,
        compiles,
    )


LATENT = {"sizes": (64, 512), "normed": True, "interleaved": True}
CASES = [
    case(
        "keys: a token of each row",
        (1, 5),
        (1, 0),
        (1, 30),
        sizes=(64, 64),
        heads=(14, 2),
        dtype=BF16,
    ),
    case("keys: prompts and steps", (9, 0), (1, 12), (4, 3), page=4, sizes=(16, 16)),
    case("keys: nowhere", (2, 3), (0, 4), (3, 1), nowhere=0, page=4, spare=2, dtype=F16),
    case("latents: a token of each row", (1, 7), (1, 2), heads=(16, 1), dtype=BF16, **LATENT),
    case(
        "latents: prompts and steps",
        (5, 0),
        (1, 6),
        heads=(4, 1),
        sizes=(6, 20),
        normed=True,
        compiles=False,
    ),
]
