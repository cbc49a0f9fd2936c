"""A model's layers run in one call where they can, and one by one where somebody is in between."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quintet import DynamicCache, OffloadedCache, QuantizedCache, Qwen2ForCausalLM, StaticCache
from quintet.cache import Cache
from quintet.kernels.native import native
from quintet.layers import stack
from quintet.layers.step import Step
from quintet.modeling import decoder
from support import relative_error, small_config

pytestmark = pytest.mark.skipif(native().library is None, reason=f"{native().reason}")

CACHES: dict[str, Callable[[Qwen2ForCausalLM], Cache]] = {
    "dynamic": lambda model: DynamicCache(model.config),
    "static": lambda model: StaticCache(model.config, 40),
    "offloaded": lambda model: OffloadedCache(model.config),
}


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(small_config(head_dim=16)).eval()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each run over the layers, whether it was one call."""
    seen: list[bool] = []
    real = stack.LayerRun.in_one_call

    def watched(run: stack.LayerRun, hidden: Tensor, step: Step) -> Tensor | None:
        made = real(run, hidden, step)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(stack.LayerRun, "in_one_call", watched)
    return seen


@torch.no_grad()
def step(model: Qwen2ForCausalLM, cache: Cache, T: int = 1) -> Tensor:
    """The logits of T tokens behind a prompt of which one row is shorter."""
    ids = torch.arange(3 * 20).view(3, 20) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return model(ids[:, :T] + 1, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("T", [1, 3])
def test_a_step_in_one_call_gives_and_keeps_what_the_layers_do(
    model: Qwen2ForCausalLM, passes: list[bool], kind: str, T: int
) -> None:
    caches = [CACHES[kind](model) for _ in range(2)]
    made = step(model, caches[0], T)
    assert passes == [False, True]
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    expected = step(model, caches[1], T)
    assert passes == [False, True, False, False]
    assert relative_error(made, expected) <= 1e-5
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours is not None
        assert theirs is not None
        for mine, reference in zip(ours.content(20), theirs.content(20), strict=True):
            for row, length in enumerate(caches[0].lengths(3).tolist()):
                error = relative_error(mine[row, :, :length], reference[row, :, :length])
                assert error <= 1e-5


def wrap_map(model: Qwen2ForCausalLM) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)  # type: ignore[no-any-return]

    model.model.layers[1].self_attn.v_proj = Wrapped(model.model.layers[1].self_attn.v_proj)


def replace_norm(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].input_layernorm = nn.Identity()


def change_forward(model: Qwen2ForCausalLM) -> None:
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: 3 * x


def own_layer(model: Qwen2ForCausalLM) -> None:
    kind = type(model.model.layers[1])
    model.model.layers[1].__class__ = type("Own", (kind,), {})


def hook_layer(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, given: (2 * given[0], given[1]))


@pytest.mark.parametrize(
    "change",
    [wrap_map, replace_norm, change_forward, own_layer, hook_layer],
    ids=lambda f: f.__name__,
)
def test_what_somebody_put_in_between_is_called(
    model: Qwen2ForCausalLM,
    passes: list[bool],
    change: Callable[[Qwen2ForCausalLM], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(model)
    made = step(model, DynamicCache(model.config))
    assert passes == [False, False]
    monkeypatch.setattr(stack.LayerRun, "in_one_call", lambda *_: None)
    assert torch.equal(made, step(model, DynamicCache(model.config)))


def test_what_a_caller_asks_to_see_comes_from_the_layers(
    model: Qwen2ForCausalLM, passes: list[bool]
) -> None:
    cache = DynamicCache(model.config)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        passes.clear()
        out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
        assert out.attentions is not None
        out = model(ids[:, :1], past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        model(ids[:, :1], past_key_values=QuantizedCache(model.config))
    with torch.enable_grad():
        assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
    assert True not in passes


def test_a_caller_s_own_keys_are_not_written_into(model: Qwen2ForCausalLM) -> None:
    cache = DynamicCache(model.config)
    with torch.no_grad():
        model(torch.arange(8)[None], past_key_values=cache)
        cache.crop(5)
        slot = cache.layers[0]
        assert slot is not None
        before = slot.content(8)
        kept = [tensor.clone() for tensor in before]
        model(torch.tensor([[3]]), past_key_values=cache)
    for tensor, old in zip(before, kept, strict=True):
        assert torch.equal(tensor, old)


def test_weights_that_are_held_are_those_of_the_beginning(
    model: Qwen2ForCausalLM, passes: list[bool]
) -> None:
    expected = step(model, DynamicCache(model.config))
    passes.clear()

    def fail_halfway() -> None:
        with model.weights_held():
            made = step(model, DynamicCache(model.config))
            assert torch.equal(made, expected)
            # Layers were gathered once, not by the step.
            assert passes == []
            replace_norm(model)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert not torch.equal(step(model, DynamicCache(model.config)), expected)
    assert passes == [False, False]


def test_nothing_is_held_once_all_have_ended(model: Qwen2ForCausalLM, passes: list[bool]) -> None:
    # As two threads may: the one that began first ends first.
    first, second = model.weights_held(), model.weights_held()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    expected = step(model, DynamicCache(model.config))
    second.__exit__(None, None, None)
    passes.clear()
    replace_norm(model)
    assert not torch.equal(step(model, DynamicCache(model.config)), expected)
    assert passes == [False, False]


def test_a_copy_made_meanwhile_reads_its_own_weights(
    model: Qwen2ForCausalLM, passes: list[bool]
) -> None:
    with model.weights_held():
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = step(model, DynamicCache(model.config))
    for other in copies:
        assert torch.equal(step(other, DynamicCache(model.config)), expected)
        replace_norm(other)
        assert not torch.equal(step(other, DynamicCache(model.config)), expected)


def test_generate_gathers_once(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch, passes: list[bool]
) -> None:
    gathered: list[bool] = []
    real = decoder.gather

    def counted(*arguments: Any) -> stack.Gathered | None:
        made = real(*arguments)
        gathered.append(made is not None)
        return made

    monkeypatch.setattr(decoder, "gather", counted)
    ids = torch.arange(20)[None]
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert gathered == [True]
    # The prompt alone came before.
    assert passes == [False]
    monkeypatch.setattr(decoder, "gather", lambda *_: None)
    monkeypatch.setattr(stack.LayerRun, "in_one_call", lambda *_: None)
    assert torch.equal(made, model.generate(ids, max_new_tokens=6, do_sample=False))
