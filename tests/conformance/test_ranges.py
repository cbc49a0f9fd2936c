"""How long a context and how large a score may get, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.families import Family, each
from quintet import DynamicCache, StaticCache
from quintet.ops import masks
from support import relative_error


class Largest(TorchDispatchMode):
    """Watches how many bytes the largest new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for made in out if isinstance(out, tuple) else (out,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in held:
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return out


def small(family: Family, **changes: Any) -> Any:
    sizes = {"vocab_size": 17, "num_hidden_layers": 2, "max_position_embeddings": 2**17}
    if family.prefix == "Zamba2":
        sizes["layers_block_type"] = ["mamba", "hybrid"]
    return family.model_of("Model", **{**sizes, **changes})


def runs(model: Any, T: int, kind: str) -> tuple[Tensor, int]:
    """The last states of a text of T tokens, and how many bytes its largest tensor had."""
    ids = torch.arange(T)[None] % 17
    cache = StaticCache(model.config, T + 8) if kind == "static" else DynamicCache(model.config)
    pieces = ids.split(T // 4 if kind == "chunks" else T, dim=1)
    with torch.no_grad(), Largest() as largest:
        for piece in pieces:
            states = model(piece, past_key_values=cache).last_hidden_state
    return states[:, -1], largest.nbytes


@pytest.mark.parametrize("kind", ["static", "chunks"])
@each
def test_memory_grows_with_a_context_and_not_with_its_square(
    family: Family, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(family)
    expected, _ = runs(model, 1024, kind)
    monkeypatch.setattr(masks, "MOST_ENTRIES", 2**16)
    monkeypatch.setattr("quintet.ops.attention.MOST_ENTRIES", 2**16)
    made, few = runs(model, 1024, kind)
    assert relative_error(made, expected) < 1e-5
    _, many = runs(model, 2048, kind)
    assert many < min(3 * max(few, 2**18), 2048 * 2048)


@each
def test_a_window_needs_no_mask_of_a_whole_text(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "Qwen2" not in family.prefix:
        return
    changes = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}
    model = small(family, **changes)
    expected, _ = runs(model, 1024, "chunks")
    monkeypatch.setattr(masks, "MOST_ENTRIES", 2**14)
    monkeypatch.setattr("quintet.ops.attention.MOST_ENTRIES", 2**14)
    for kind in ("static", "chunks", "dynamic"):
        made, few = runs(model, 1024, kind)
        assert relative_error(made, expected) < 1e-5
        assert few < 1024 * 1024


# -- float16 ---------------------------------------------------------------------------------


def with_large_scores(model: Any, factor: float) -> Any:
    """Make products of queries and keys pass what float16 holds."""
    scaled = ["q_proj.weight", "k_proj.weight", "q_b_proj.weight"]
    scaled += ["kv_a_layernorm.weight", "q_a_layernorm.weight"]
    scaled += ["shared_transformer.input_layernorm.weight"]
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(scaled)):
            parameter.data *= factor
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.data.fill_(10 * factor)
    return model


@pytest.mark.parametrize("factor", [20.0, 60.0])
@each
def test_scores_beyond_float16_are_scores(
    family: Family, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_large_scores(family.model_of(), factor).half()
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for way in family.ways:
        model.config.attn_implementation = family.backend(way, monkeypatch)
        for given in ({}, {"attention_mask": mask}):
            out = model(ids, output_attentions=True, use_cache=True, **given)
            assert bool(out.logits.isfinite().all()), way
            assert all(bool(weights.isfinite().all()) for weights in out.attentions)
            out.logits.float().square().mean().backward()
            model(ids[:, :1], past_key_values=out.past_key_values, output_attentions=True)
            plain = model(ids, **given)
            step = model(ids[:, :1], past_key_values=plain.past_key_values).logits
            assert bool(plain.logits.isfinite().all())
            assert bool(step.isfinite().all()), way
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)


@each
def test_autocast_to_float16_keeps_scores_in_range(family: Family) -> None:
    model = with_large_scores(family.model_of(), 60.0)
    ids = torch.arange(1, 10)[None]
    for changes in ({}, {"output_attentions": True}):
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            assert bool(model(ids, **changes).logits.isfinite().all())
