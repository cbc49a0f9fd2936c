"""Inputs of `quintet.triton.mamba2`: texts in a packed row and in rectangles, kept on any rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton.cases import Case
from quintet.kernels.ssm import MixerWeights
from quintet.ops.mamba2 import mix_stepwise
from quintet.ops.mamba2_texts import mix_texts
from quintet.triton import mamba2 as kernels
from quintet.triton.texts import Texts

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Scene:
    """Texts, and the mixer that they go through.

    Attributes:
        tokens: how many each text has; of a rectangle, how many are real.
        heads: H, P, G and N.
        taps: W.
        dtype: of what is projected.
        rows: where what is kept of each lies, below 0 nowhere; None for beside each other.
        kept: whether anything was.
        width: how many tokens a rectangle's rows have; None for texts in a packed row.
        bias: whether the convolution has one.
    """

    tokens: Sequence[int]
    heads: tuple[int, int, int, int] = (4, 16, 2, 16)
    taps: int = 4
    dtype: torch.dtype = F32
    rows: Sequence[int] | None = None
    kept: bool = True
    width: int | None = None
    bias: bool = True


def inputs(device: torch.device, *, scene: Scene) -> Mapping[str, Any]:
    """Return what a mixer is given of a scene; the same each time."""
    g = torch.Generator().manual_seed(sum(scene.tokens) + sum(scene.heads))
    (H, P, G, N), W, n = scene.heads, scene.taps, len(scene.tokens)
    inner, C = H * P, H * P + 2 * G * N

    def randn(*shape: int, dtype: torch.dtype = scene.dtype) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    lead = (sum(scene.tokens),) if scene.width is None else (n, scene.width)
    # A slice of something wider, as a part of a projection is.
    projected = randn(*lead, inner + C + H + 8)[..., : inner + C + H]
    weights = MixerWeights(
        # As a module holds them.
        taps=randn(C, 1, W).squeeze(1) / 2,
        conv_bias=randn(C) if scene.bias else None,
        dt_bias=randn(H, dtype=F32) - 2,
        A_log=torch.rand(H, generator=g).to(device) * 4 - 1,
        D=randn(H, dtype=F32),
        norm=randn(inner),
        num_groups=G,
        dt_limits=(0.001, 5.0),
        eps=1e-5,
    )
    given: dict[str, Any] = {
        "projected": projected,
        "weights": weights,
        "window": None,
        "state": None,
    }
    if scene.kept:
        R = max(n, max(scene.rows or [0]) + 1) + 1
        R = R if scene.width is None else n
        # As a pool's rows lie that are not all in use.
        given["window"] = randn(R + 1, W - 1, C)[:R]
        given["state"] = randn(R + 1, H, P, N, dtype=F32)[:R]
    if scene.width is None:
        ends = torch.tensor([0, *scene.tokens]).cumsum(0).int().to(device)
        rows = None if scene.rows is None else torch.tensor(scene.rows).int().to(device)
        return {**given, "texts": Texts(n, max(scene.tokens), ends, rows)}
    whole = all(count == scene.width for count in scene.tokens)
    return {**given, "counts": None if whole else torch.tensor(scene.tokens, device=device)}


def outcome(mix: Any, **given: Any) -> tuple[Tensor, ...] | None:
    """Return what a mixer makes of texts, and what is kept of them behind that."""
    given = {**given, **{name: _copied(given[name]) for name in ("window", "state")}}
    made = mix(**given)
    if made is None:
        return None
    kept = tuple(x for x in (given["window"], given["state"]) if x is not None)
    return (*made, *kept) if len(made) == 3 else (*made,)


def stepwise(
    projected: Tensor,
    weights: MixerWeights,
    *,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the fields of `Mixed`, made step by step."""
    return tuple(mix_stepwise(projected, weights, window, state, counts, chunk_size=64))


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.new_empty(len(x) + 1, *x.shape[1:])[: len(x)].copy_(x)


def case(name: str, *tokens: int, compiles: bool = True, **more: Any) -> Case:
    scene = Scene(tokens, **more)
    tolerance = {F32: 1e-5, BF16: 2**-6, F16: 2**-9}[scene.dtype]
    packed = scene.width is None
    kernel = kernels.mix_texts if packed else kernels.mamba2
    definition = mix_texts.definition if packed else stepwise
    return Case(
        name,
        partial(outcome, kernel),
        partial(outcome, definition),
        partial(inputs, scene=scene),
        tolerance,
        compiles,
    )


LIKE = {"compiles": False}
CASES = [
    case(
        "a token of each text, on any rows", 1, 1, 1, rows=(3, 0, 5), heads=(2, 64, 1, 64), **LIKE
    ),
    case("prompts and steps", 70, 1, 33, 5, 130, rows=(4, 1, -1, 0, 2), dtype=BF16, **LIKE),
    case("prompts in float32", 70, 1, 17, heads=(2, 24, 1, 40), bias=False, **LIKE),
    case("prompts in float16", 40, 3, 0, 18, dtype=F16, kept=False, taps=2),
    case("heads of 64 channels", 40, 3, rows=(1, 0), heads=(2, 64, 1, 128), dtype=BF16),
    case("a rectangle", 3, 3, width=3, heads=(2, 16, 1, 16), **LIKE),
    case("a rectangle with padding", 40, 2, 0, width=40, heads=(1, 64, 1, 128)),
    case("a token a row", 1, 1, width=1, dtype=BF16, **LIKE),
    case("beginnings", 20, 20, width=20, kept=False, dtype=BF16, **LIKE),
]
