"""Every operation that a kernel computes, with small inputs that fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.gguf.types import BY_NAME
from quintet.kernels.matrix import Matrix
from quintet.kernels.ssm import MixerWeights
from quintet.layers.mlp import GatedMLP
from quintet.ops import activations
from quintet.ops.activations import gate_by
from quintet.ops.attention import sdpa
from quintet.ops.blocks import decode_blocks, split_blocks
from quintet.ops.group_fit import quantize_groups
from quintet.ops.linear import linear, linears
from quintet.ops.mamba2 import mix
from quintet.ops.masks import AttentionMask, attention_mask_of
from quintet.ops.mla import expanded, latent_attention
from quintet.ops.moe import apply_experts, top_experts
from quintet.ops.norm import rms_norm
from quintet.ops.quantized import (
    decode,
    dequantize_int4,
    dequantize_int8,
    int4_linear,
    int8_linear,
    quantize_int4,
    quantize_int8,
    quantized_linears,
)
from quintet.ops.rope import rotate_both
from quintet.ops.routing import RoutingRules, router_logits, sigmoid_routing, softmax_routing
from quintet.ops.sampling import penalise_repetition

__all__ = ["CASES", "Case", "assert_alike", "bound", "mutants", "outcome"]

Run = Callable[..., Any]
BOTH = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """An operation that a kernel computes, with inputs that fit."""

    name: str
    run: Run
    inputs: dict[str, Tensor]


def seen_by(start: Tensor, T: int, S: int) -> AttentionMask:
    slots = start[:, None] + torch.arange(T)
    return attention_mask_of(slots, start, S, None)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
    T, S = q.shape[-2], k.shape[-2]
    seen = seen_by(torch.tensor([S - T, max(S - T - 3, 0)]), T, S)
    return first_of(sdpa, q=q, k=k, v=v, mask=seen, scale=0.3, dropout=0.0)


def first_of(run: Run, **inputs: Any) -> Any:
    return run(**inputs)[0]


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    module = GatedMLP(40, 24, act="silu")
    weights = {f"{n}_proj.weight": w for n, w in (("gate", gate), ("up", up), ("down", down))}
    for name in weights:
        holder = module.get_submodule(name.removesuffix(".weight"))
        del holder.weight
        # As it is given, which a parameter would not be.
        holder.__dict__["weight"] = weights[name]
    return module(x)


def group_linear(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> Any:
    return quantized_linears(x, [Matrix(weight, scale, bias, offset)])[0]


def widened(
    weight: Tensor, scale: Tensor, offset: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    return decode(Matrix(weight, scale, None, offset), columns, dtype)


def absorbing(w_kv: Tensor, **inputs: Tensor) -> Any:
    return first_of(latent_attention, **inputs, w_kv=w_kv, expand=by(w_kv), **how(**inputs))


def expanding(w_kv: Tensor, **inputs: Tensor) -> Any:
    return first_of(expanded, **inputs, expand=by(w_kv), **how(**inputs))


def how(q_nope: Tensor, c_kv: Tensor, **_: Tensor) -> dict[str, Any]:
    T, S = q_nope.shape[-2], c_kv.shape[-2]
    seen = seen_by(torch.tensor([S - T, max(S - T - 3, 0)]), T, S)
    return {"mask": seen, "attend": sdpa, "scale": 0.2, "dropout": 0.0}


def by(w_kv: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda c_kv: linear(c_kv, w_kv.flatten(0, 1))


def mixer(**inputs: Any) -> Any:
    names = ("taps", "conv_bias", "dt_bias", "A_log", "D", "norm")
    weights = MixerWeights(*(inputs.pop(name) for name in names), 1, (0.0, torch.inf), 1e-5)
    made = mix(weights=weights, chunk_size=64, **inputs)
    # Inside, a kernel keeps float32.
    return tuple(made._replace(convolved=made.convolved.float()))


def weights_by(choice: Run, logits: Tensor, **inputs: Any) -> Any:
    """The weights alone: which of equal experts is chosen, and in which order, is open."""
    return choice(logits, **inputs)[1].sort(dim=-1).values


def cases() -> Iterator[Case]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    for dtype in BOTH:

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return randn(*shape, dtype=dtype)

        def case(name: str, run: Run, /, dtype: torch.dtype = dtype, **inputs: Tensor) -> Case:
            return Case(f"{name}-{str(dtype).removeprefix('torch.')}", run, inputs)

        x = make(3, 40)
        yield case("rms_norm", partial(rms_norm, eps=1e-5), x=make(2, 3, 40), weight=make(40))
        yield case(
            "rotate",
            rotate_both,
            q=make(2, 4, 3, 16),
            k=make(2, 2, 3, 16),
            cos=make(2, 3, 16),
            sin=make(2, 3, 16),
        )
        yield case(
            "rotate-neighbours",
            partial(rotate_both, interleaved=True),
            q=make(2, 4, 3, 16),
            k=make(2, 2, 3, 16),
            cos=make(1, 3, 16),
            sin=make(1, 3, 16),
        )
        yield case("silu", partial(gate_by, F.silu), gate=make(3, 40), up=make(3, 40))
        yield case(
            "linears",
            lambda x, w, b, v: linears(x, [(w, b), (v, None)]),
            x=x,
            w=make(8, 40),
            b=make(8),
            v=make(6, 40),
        )
        q, scale = quantize_int8(randn(8, 40))
        yield case("int8", int8_linear, x=x, q=q, scale=scale, bias=make(8))
        yield case("widen-int8", partial(dequantize_int8, dtype=dtype), q=q, scale=scale)
        q, scale = quantize_int4(randn(8, 70))
        yield case("int4", int4_linear, x=make(3, 70), packed=q, scale=scale, bias=make(8))
        wide = partial(dequantize_int4, columns=70, dtype=dtype)
        yield case("widen-int4", wide, packed=q, scale=scale)
        # Of small bytes, as none is a scale that is not finite.
        raw = torch.randint(60, (8, 2 * 144), generator=g, dtype=torch.uint8)
        yield case("blocks", partial(decode_blocks, kind=BY_NAME["Q4_K"], dtype=dtype), raw=raw)
        yield case("parts-of-blocks", partial(split_blocks, kind=BY_NAME["Q4_K"]), raw=raw)
        q, scale, offset = quantize_groups(randn(8, 70), 4, 32, offset=True)
        groups = {"weight": q, "scale": scale, "offset": offset}
        yield case("int4-groups", group_linear, x=make(3, 70), **groups, bias=make(8))
        yield case("widen-int4-groups", partial(widened, columns=70, dtype=dtype), **groups)
        matrices = {"gate": make(24, 40), "up": make(24, 40), "down": make(40, 24)}
        yield case("mlp", mlp, x=x, **matrices)
        experts = {"gate_up": make(4, 48, 40), "down": make(4, 40, 24)}

        chosen = {
            "indices": torch.tensor([[0, 3], [1, 3], [2, 0]]),
            "weights": torch.rand(3, 2, generator=g),
        }
        yield case("experts", partial(apply_experts, act=F.silu), x=x, **chosen, **experts)
        top = partial(weights_by, partial(top_experts, A=2, normalise=True))
        yield case("top", top, logits=make(3, 8))
        yield case("router_logits", router_logits, x=x, weight=make(8, 40))
        rules = RoutingRules(active=2, groups=2, kept_groups=1, normalise=True, scaling=1.5)
        softmax = partial(weights_by, partial(softmax_routing, rules=rules))
        yield case("softmax", softmax, logits=make(3, 8))
        sigmoid = partial(weights_by, partial(sigmoid_routing, rules=rules))
        yield case("sigmoid", sigmoid, logits=make(3, 8), bias=randn(8))

        kv = {"k": make(2, 2, 9, 32), "v": make(2, 2, 9, 32)}
        yield case("decode", attention, q=make(2, 4, 1, 32), **kv)
        yield case(
            "mixer",
            mixer,
            projected=make(2, 3, 32 + 32 + 32 + 2),
            taps=make(64, 4),
            conv_bias=make(64),
            dt_bias=randn(2),
            A_log=randn(2),
            D=randn(2),
            norm=make(32),
            window=make(2, 3, 64),
            state=randn(2, 2, 16, 16),
            counts=torch.tensor([3, 1]),
        )
        if dtype == torch.float32:
            yield case(
                "repetition",
                partial(penalise_repetition, penalty=1.3),
                logits=randn(2, 30),
                ids=torch.tensor([[3, 4, 4], [0, 29, 31]]),
                kept=torch.tensor([[True, True, False], [True, True, True]]),
            )
            continue
        yield case("gelu", partial(gate_by, F.gelu), gate=make(3, 40), up=make(3, 40))
        yield case("share", activations.sigmoid, x=make(3, 40))
        many = make(40, 40)
        yield case(
            "products",
            lambda x, w, b: linears(x, [(w, b)]),
            x=make(70, 40),
            w=make(8, 40),
            b=make(8),
        )
        yield case("mlp-many", mlp, x=many, **matrices)
        chosen = {
            "indices": torch.arange(80).view(40, 2) % 4,
            "weights": torch.rand(40, 2, generator=g),
        }
        yield case("experts-many", partial(apply_experts, act=F.silu), x=many, **chosen, **experts)
        yield case("attention", attention, q=make(2, 4, 5, 32), **kv)
        latents = {
            "q_nope": make(2, 4, 2, 16),
            "q_pe": make(2, 4, 2, 8),
            "c_kv": make(2, 9, 32),
            "k_pe": make(2, 9, 8),
            "w_kv": make(4, 16 + 32, 32) / 6,
        }
        yield case("absorbed", absorbing, **latents)
        yield case("expanded", expanding, **latents)


CASES = list(cases())


def outcome(case: Case, inputs: dict[str, Tensor]) -> Any:
    """What an operation makes, or how it fails."""
    try:
        made = case.run(**inputs)
    except Exception as error:
        return type(error), str(error)
    return [made] if isinstance(made, Tensor) else list(made)


def assert_alike(made: Any, expected: Any, label: str, rough: float) -> None:
    assert type(made) is type(expected), f"{label}: {made} and not {expected}"
    if not isinstance(made, list):
        assert made == expected, label
        return
    for ours, torchs in zip(made, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (torchs.shape, torchs.dtype, torchs.device)
        if torchs.layout is not torch.strided:
            ours, torchs = ours.to_dense(), torchs.to_dense()
        # Of an input without numbers torch makes any.
        if torchs.is_meta or "meta" in label:
            continue
        ours, torchs = ours.double(), torchs.double()
        if made[0].dtype.itemsize == 2:
            rough = 2**-5
        scale = torchs.nan_to_num(0, 0, 0).abs().amax() if torchs.numel() else 1.0
        torch.testing.assert_close(
            ours, torchs, rtol=rough, atol=float(rough * scale), equal_nan=True, msg=label
        )


def bound(case: Case) -> float:
    """A rounding more or less on the way; vectors are rounded to 16 bits for integers."""
    return 2**-5 if "bfloat16" in case.name else 2**-10 if "int" in case.name else 1e-5


class Wrapped(torch.Tensor):
    """Any tensor that is more than one."""


def mutants(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensor held otherwise, and others that nearly are it."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        if dtype != x.dtype:
            yield f"{dtype}", x.to(dtype)
    for axis, n in enumerate(x.shape):
        # Keys of no head, or of one slot beside values of more, end the process in torch itself.
        least = 2 if x.ndim == 4 else 0
        for m in sorted(m for m in {n - 1, n + 1, 2 * n, n // 2, 1, 0} - {n} if m >= least):
            yield f"{m} along {axis}", x.index_select(axis, torch.arange(m) % n)
    yield "an axis more", x[None]
    yield "an axis less", x[0]
    yield "last axis apart", torch.stack((x, x), dim=-1)[..., 0]
    yield "turned", x.mT.contiguous().mT if x.ndim > 1 else x
    yield "first axis apart", torch.cat((x, x))[: len(x)] if x.ndim > 2 else x[:, None][:, 0]
    yield "expanded", x[..., :1].expand(x.shape)
    yield "a subclass", x.as_subclass(Wrapped)
    yield "meta", x.to("meta")
    if x.is_floating_point():
        yield "negative bit", torch._neg_view(-x)
        yield "sparse", x.to_sparse()
    elif x.dtype == torch.int64:
        for value in (-1, -(2**62), 2**62, 9):
            wrong = x.clone()
            wrong.view(-1)[0] = value
            yield f"{value} in it", wrong
