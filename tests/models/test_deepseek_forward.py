"""What DeepSeek-V2 and -V3 share: two ways to attend, latents in caches, rules of configs."""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from families.deepseek import GROUPS, YARN, config_of, model_of
from quintet import DynamicCache, StaticCache
from quintet.backends import REGISTRY
from quintet.kernels.native import native
from quintet.ops.mla import absorbs
from support import relative_error

TOLERANCE = 1e-5
KINDS = ["DeepseekV2", "DeepseekV3"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("family", KINDS)
def test_a_long_text_in_chunks_takes_both_ways(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = set()

    def noted(T: int, S: int) -> bool:
        ways.add(absorbs(T, S))
        return absorbs(T, S)

    monkeypatch.setattr("quintet.ops.mla.absorbs", noted)
    model = model_of(family, rope_scaling=YARN)
    ids = torch.randint(101, (1, 420))
    whole = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, 420) if kind == "preallocated" else model.new_cache()
    cuts = (0, 100, 290, 300, 301, 302, 420)
    parts = [
        model(ids[:, start:stop], past_key_values=cache).logits for start, stop in pairwise(cuts)
    ]
    assert relative_error(torch.cat(parts, dim=1), whole) < TOLERANCE
    assert ways == {True, False}


@torch.no_grad()
def test_flash_attention_gets_one_head_size_and_decoding_does_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        assert options["causal"]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        scale = options["softmax_scale"]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)
        return out.transpose(1, 2)

    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    # All experts, so that rounding cannot change the choice of some.
    changes = {"num_experts_per_tok": 8, "topk_group": 4, "n_group": 4}
    model = model_of("DeepseekV3", **changes).bfloat16()
    ids = torch.randint(101, (2, 12))
    plain = model(ids).logits.float()
    model.set_attn_implementation("flash_attention_2")
    cache = model.new_cache()
    made = [model(part, past_key_values=cache).logits for part in (ids[:, :11], ids[:, 11:])]
    assert shapes == [(24, 24, 24)] * 3
    assert relative_error(torch.cat(made, dim=1).float(), plain) < 0.03


@torch.no_grad()
def test_legacy_tuples_hold_latents_and_rotated_keys() -> None:
    model = model_of("DeepseekV3")
    ids = torch.randint(101, (2, 10))
    past: Any = tuple((torch.zeros(2, 1, 0, 24), torch.zeros(2, 1, 0, 8)) for _ in range(3))
    steps = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        out = model(ids[:, start:stop], past_key_values=past)
        past = out.past_key_values
        assert past[0][0].shape == (2, 1, stop, 24)
        assert past[0][1].shape == (2, 1, stop, 8)
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, dim=1), model(ids).logits) < TOLERANCE


# Sizes that kernels take, and all experts, as rounding may change the choice of some.
WIDE: dict[str, Any] = {
    "kv_lora_rank": 64,
    "v_head_dim": 32,
    "num_experts_per_tok": 8,
    "n_group": 4,
    "topk_group": 4,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("family", KINDS)
def test_kernels_are_no_farther_from_float32_than_pytorch(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of their own lengths, a prompt, single steps, and several tokens behind a past."""
    exact, model = model_of(family, **WIDE), model_of(family, **WIDE).bfloat16()
    ids = torch.randint(101, (3, 60))
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :21] = 0, 0

    def logits(model: Any) -> Tensor:
        cache = StaticCache(model.config, 90) if kind == "preallocated" else model.new_cache()
        parts = [model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache).logits]
        for start, stop in pairwise((40, 41, 42, 57, 58, 60)):
            parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
        made: Tensor = torch.cat(parts, dim=1).float()[mask.bool()]
        return made

    truth, by_kernels = logits(exact), logits(model)
    for name in ("latent attention", "attention", "gated mlp", "experts"):
        monkeypatch.setattr(REGISTRY.operations[name], "order", ())
    by_pytorch = logits(model)

    def error(made: Tensor) -> float:
        return float((made - truth).square().mean().sqrt() / truth.square().mean().sqrt())

    assert error(by_kernels) <= 1.5 * error(by_pytorch) + 2**-8
    assert error(by_kernels) < 0.05


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("hooked", [False, True], ids=["in-one-call", "layer-by-layer"])
def test_generate_runs_on_the_kernels(
    family: str, hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native().library is None:
        pytest.skip(f"no kernels: {native().reason}")
    from quintet.layers.stack import LayerRun

    ran = {"latent attention": 0, "attention": 0, "experts": 0, "all layers": 0}

    def counted(name: str, kernel: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Tensor | None:
            made: Tensor | None = kernel(*inputs, **options)
            ran[name] += made is not None
            return made

        return run

    of_experts = {"gated mlp": "experts"}  # and MLPs, of few tokens; "experts" are those of many
    for name in ("latent attention", "attention", "gated mlp", "experts"):
        asked = REGISTRY.operations[name]
        order = tuple(counted(of_experts.get(name, name), one) for one in asked.order)
        monkeypatch.setattr(asked, "order", order)
    monkeypatch.setattr(LayerRun, "run_fused", counted("all layers", LayerRun.run_fused))
    model = model_of(family, **WIDE, max_position_embeddings=160).bfloat16()
    if hooked:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: None)
    model.generate(torch.randint(101, (1, 129)), max_new_tokens=4, do_sample=False)
    # Three layers, of which two have experts and one shared by all; a prompt and three steps.
    run_fused = {"latent attention": 0, "attention": 3, "experts": 2, "all layers": 3}
    by_layer = {"latent attention": 9, "attention": 3, "experts": 2 + 3 * 5, "all layers": 0}
    assert ran == (by_layer if hooked else run_fused)


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        pytest.param("DeepseekV2", 27, 31_104, id="V2-Lite"),
        pytest.param("DeepseekV3", 61, 70_272, id="V3"),
    ],
)
@torch.no_grad()
def test_cache_bytes_of_a_token_at_released_geometry(
    family: str, layers: int, expected: int
) -> None:
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": layers}
    small = {"q_lora_rank": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = model_of(family, **sizes, **small).bfloat16()
    static = StaticCache(model.config, max_cache_len=6)
    growing = DynamicCache(model.config)
    for cache in (static, growing):
        model(torch.randint(101, (2, 6)), past_key_values=cache)
        assert cache.nbytes == 2 * 6 * expected
        assert cache.nbytes / 12 / layers == 2 * (512 + 64)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("DeepseekV2", {"num_key_value_heads": 2}, ["num_key_value_heads=2", "=4"]),
        ("DeepseekV3", {"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "even"]),
        ("DeepseekV2", {"topk_method": "best"}, ["topk_method='best'", "greedy"]),
        ("DeepseekV2", {**GROUPS, "n_group": 3}, ["n_group=3", "n_routed_experts=8"]),
        ("DeepseekV2", {**GROUPS, "topk_group": None}, ["topk_group=None", "n_group=4"]),
        ("DeepseekV3", {"topk_group": 1}, ["num_experts_per_tok=3", "at most 2"]),
        ("DeepseekV3", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ("DeepseekV2", {"scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "softmax"]),
    ],
)
def test_a_config_that_breaks_a_rule_is_named(
    family: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(Exception, match=words[0]) as caught:
        config_of(family, **changes)
    for word in words:
        assert word in str(caught.value)
