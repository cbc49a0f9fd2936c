"""A model's layers run in one call where they can, and one by one where somebody is in between."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import conformance.families as conformance
from conformance.families import WIDE, Family
from quintet import DynamicCache, OffloadedCache, QuantizedCache, Qwen2ForCausalLM, StaticCache
from quintet.cache import Cache
from quintet.kernels.native import native
from quintet.layers import stack
from quintet.layers.context import ForwardContext
from quintet.layers.norm import RMSNorm
from quintet.modeling import layer_stack
from support import relative_error, small_config

pytestmark = pytest.mark.skipif(native().library is None, reason=f"{native().reason}")


def dynamic_cache(model: Any) -> Cache:
    return DynamicCache(model.config)


# Latent attention is a kernel in bfloat16 alone.
ROUNDED = ("deepseek-v2", "deepseek-v3")
FAMILIES = [family for family in conformance.FAMILIES if family.name in WIDE]
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": dynamic_cache,
    "static": lambda model: StaticCache(model.config, 40),
    "offloaded": lambda model: OffloadedCache(model.config),
}


def model_of(family: Family, **changes: Any) -> Any:
    model = family.model_of(**{**WIDE[family.name], **changes})
    return model.to(torch.bfloat16) if family.name in ROUNDED else model


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(small_config(head_dim=16)).eval()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each run over the layers, whether it was one call."""
    seen: list[bool] = []
    real = stack.LayerRun.run_fused

    def watched(run: stack.LayerRun, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        made = real(run, hidden, context)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(stack.LayerRun, "run_fused", watched)
    return seen


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was gathered, in order."""
    seen: list[Any] = []
    real = layer_stack.gather

    def watched(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(layer_stack, "gather", watched)
    return seen


@torch.no_grad()
def steps(model: Any, new_cache: Callable[[Any], Cache], T: int) -> tuple[Tensor, Cache]:
    """The logits of three steps of T tokens behind a prompt of which one row is shorter."""
    cache = new_cache(model)
    ids = torch.arange(3 * 12).view(3, 12) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    made = [
        model(ids[:, at : at + T], past_key_values=cache, use_cache=True).logits for at in range(3)
    ]
    return torch.cat(made, dim=1), cache


def assert_same_content(ours: Cache, theirs: Cache) -> None:
    lengths = ours.lengths(3).tolist()
    assert lengths == theirs.lengths(3).tolist()
    for mine, reference in zip(ours.layers, theirs.layers, strict=True):
        if mine is None or reference is None:
            continue
        for x, y in zip(mine.content(max(lengths)), reference.content(max(lengths)), strict=True):
            for row, length in enumerate(lengths):
                assert relative_error(x[row, :, :length], y[row, :, :length]) <= 1e-5
    for held, known in zip(ours.states, theirs.states, strict=True):
        if held is not None and held.state is not None:
            assert relative_error(held.state, known.state) <= 1e-5
            assert relative_error(held.window, known.window) <= 1e-5


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
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_in_one_call_gives_and_keeps_what_the_layers_do(
    family: Family, passes: list[bool], kind: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    made, cache = steps(model, CACHES[kind], T)
    assert passes == [False, *[True] * 3]
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    expected, reference = steps(model, CACHES[kind], T)
    assert relative_error(made, expected) <= 1e-5
    assert_same_content(cache, reference)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, id=f"{family.name}-{variant}")
        for family in FAMILIES
        for variant in family.variants
    ],
)
def test_every_form_of_a_family_runs_in_one_call_but_for_other_mlps(
    family: Family, variant: str, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = family.variants[variant]
    model = model_of(family, **values)
    made, cache = steps(model, dynamic_cache, 1)
    other = {"zamba2": "silu"}.get(family.name, "gelu")
    known = values.get("hidden_act") != other and not values.get("mlp_bias")
    assert (passes == [False, *[True] * 3]) == known
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    expected, reference = steps(model, dynamic_cache, 1)
    assert relative_error(made, expected) <= 1e-5
    assert_same_content(cache, reference)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tokens_one_by_one_are_the_same_to_the_last_bit(
    family: Family, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family).to(torch.bfloat16)
    made, _ = steps(model, dynamic_cache, 1)
    assert True in passes
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    expected, _ = steps(model, dynamic_cache, 1)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_weights_of_fewer_bits_are_the_same_to_the_last_bit(
    family: Family, quantize: str, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = model_of(family).to(torch.bfloat16)
    model = type(wide).from_pretrained(
        None,
        config=wide.config,
        state_dict=wide.state_dict(),
        dtype=torch.bfloat16,
        quantize=quantize,
    )
    made, _ = steps(model, dynamic_cache, 1)
    assert passes == [False, *[True] * 3]
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    expected, _ = steps(model, dynamic_cache, 1)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_hook_anywhere_is_called_as_often_as_by_the_layers(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    named = dict(model.base_model.named_modules())

    def count(name: str) -> int:
        calls = []
        handle = named[name].register_forward_hook(lambda *_: calls.append(None))
        steps(model, dynamic_cache, 1)
        handle.remove()
        return len(calls)

    in_place = {name: count(name) for name in named if name}
    assert sum(in_place.values()) > len(in_place)
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    assert in_place == {name: count(name) for name in in_place}


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


def own_layer_of_another_forward(model: Qwen2ForCausalLM) -> None:
    kind = type(model.model.layers[1])

    class Own(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
            return 2 * hidden_states

    model.model.layers[1].__class__ = Own


def hook_layer(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, given: (2 * given[0],))


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
    # The prompt, and a step whose second of three layers is called.
    assert passes == [False, True, False, True]
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    assert relative_error(made, step(model, DynamicCache(model.config))) <= 1e-5


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


@pytest.mark.parametrize("family", [f for f in FAMILIES if "router_logits" in f.compared], ids=str)
def test_router_logits_that_are_asked_for_come_from_the_layers(
    family: Family, passes: list[bool]
) -> None:
    model = model_of(family)
    cache = DynamicCache(model.config)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        out = model(ids[:, :1], past_key_values=cache, output_router_logits=True)
    assert len(out.router_logits) == len(family.routes(model.config))
    assert True not in passes


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("way", ["one call", "called", "first", "last"])
@pytest.mark.parametrize("ragged", [False, True])
def test_states_that_may_be_gone_back_to_stay_in_one_call(
    dtype: torch.dtype, tolerance: float, way: str, ragged: bool, passes: list[bool]
) -> None:
    """What a kernel has left of the tokens and what layers have lead back to the same states."""
    (family,) = (family for family in FAMILIES if family.name == "zamba2")
    model = model_of(family).to(dtype)
    caches = [DynamicCache(model.config) for _ in range(2)]
    ids = torch.randint(2, 90, (3, 14))
    mask = torch.ones(3, 14, dtype=torch.long)
    if ragged:
        mask[1, 8:10], mask[2, 9], mask[0, 12] = 0, 0, 0
    forwards = [slice(8, 11), slice(11, 12), slice(12, 14)]
    called = {"one call": [], "called": forwards, "first": forwards[:1], "last": forwards[-1:]}[way]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :8], past_key_values=cache)
        held, plain = caches
        held.snapshot()
        for part in forwards:
            passes.clear()
            # States that are asked for come from layers that are called.
            asked = {"attention_mask": mask[:, : part.stop], "output_hidden_states": part in called}
            model(ids[:, part], past_key_values=held, **asked)
            assert passes == [part not in called]
        for kept in ([11, 10, 11], [9, 8, 10], [8, 8, 8]):
            held.crop(torch.tensor(kept))
            for row, length in enumerate(kept):
                alone = copy.deepcopy(plain)
                alone.batch_select_indices(torch.tensor([row]))
                tokens = ids[row, mask[row].bool()]
                for at in range(8, length):
                    model(tokens[None, at : at + 1], past_key_values=alone)
                for made, told in zip(held.states, alone.states, strict=True):
                    assert relative_error(made.window[row], told.window[0]) <= 2e-2 ** (
                        dtype.itemsize / 2
                    )
                    assert relative_error(made.state[row], told.state[0]) <= 2e-2 ** (
                        dtype.itemsize / 2
                    )
    assert held.lengths(3).tolist() == [8] * 3


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


def swap_weight(model: Qwen2ForCausalLM) -> None:
    proj = model.model.layers[1].mlp.up_proj
    proj.weight = nn.Parameter(2 * proj.weight.detach())


def swap_memory(model: Qwen2ForCausalLM) -> None:
    proj = model.model.layers[1].mlp.up_proj
    proj.weight.data = 2 * proj.weight.data


def edit_weight(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)


def swap_layer(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[2])


def swap_final_norm(model: Qwen2ForCausalLM) -> None:
    model.model.norm = nn.Identity()


def swap_activation(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].mlp.act_fn = torch.tanh


def change_epsilon(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def hook_map(model: Qwen2ForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, given, out: 2 * out)


def parametrize_map(model: Qwen2ForCausalLM) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", Double())


CHANGES = [
    wrap_map,
    replace_norm,
    change_forward,
    own_layer_of_another_forward,
    hook_layer,
    swap_weight,
    swap_memory,
    edit_weight,
    swap_layer,
    swap_final_norm,
    swap_activation,
    change_epsilon,
    hook_map,
    parametrize_map,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_changed_between_two_steps_is_seen_by_the_next(
    model: Qwen2ForCausalLM, gathered: list[Any], change: Callable[[Qwen2ForCausalLM], None]
) -> None:
    cache = DynamicCache(model.config)
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.fused_session(cache):
        model(ids, past_key_values=cache)
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), past_key_values=cache)
        assert len(gathered) == 1
        before, after = copy.deepcopy(cache), copy.deepcopy(cache)
        unchanged = model(torch.tensor([[6]]), past_key_values=before).logits
        change(model)
        made = model(torch.tensor([[6]]), past_key_values=cache).logits
    with torch.no_grad():
        expected = model(torch.tensor([[6]]), past_key_values=after).logits
    assert torch.equal(made, expected)
    assert not torch.equal(made, unchanged)


def test_a_class_that_is_patched_between_two_steps_is_seen_by_the_next(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DynamicCache(model.config)
    with torch.no_grad(), model.fused_session(cache):
        model(torch.arange(20)[None], past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        calls: list[nn.Module] = []
        written = RMSNorm.forward

        def mine(norm: RMSNorm, x: Tensor) -> Tensor:
            calls.append(norm)
            return written(norm, x)

        monkeypatch.setattr(RMSNorm, "forward", mine)
        model(torch.tensor([[3]]), past_key_values=cache)
    assert len(calls) == 2 * model.config.num_hidden_layers + 1


def test_nothing_is_kept_at_the_end_nor_after_a_failure(
    model: Qwen2ForCausalLM, gathered: list[Any]
) -> None:
    cache = DynamicCache(model.config)

    def fail_halfway() -> None:
        with model.fused_session(cache):
            step(model, cache)
            step(model, copy.deepcopy(cache))
            assert cache.fused_runs is not None
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert cache.fused_runs is None
    before = len(gathered)
    with torch.no_grad():
        for _ in range(2):
            model(torch.tensor([[1]] * 3), past_key_values=cache)
    assert len(gathered) == before + 2
    assert cache.fused_runs is None


def test_copies_made_meanwhile_read_their_own_weights(model: Qwen2ForCausalLM) -> None:
    cache = DynamicCache(model.config)
    with torch.no_grad(), model.fused_session(cache):
        model(torch.arange(20)[None], past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        for copied in (
            lambda x: copy.deepcopy(x),
            lambda x: pickle.loads(pickle.dumps(x)),
        ):
            other, its_cache = copied(model), copied(cache)
            assert its_cache.fused_runs is None
            edit_weight(other)
            plain = model(torch.tensor([[4]]), past_key_values=copied(cache)).logits
            assert not torch.equal(other(torch.tensor([[4]]), past_key_values=its_cache)[0], plain)


def test_generate_gathers_once(
    model: Qwen2ForCausalLM,
    gathered: list[Any],
    passes: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.arange(20)[None]
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(gathered) == 1
    # The prompt, and five steps.
    assert passes == [False, *[True] * 5]
    monkeypatch.setattr(stack.LayerRun, "run_fused", lambda *_: None)
    assert torch.equal(made, model.generate(ids, max_new_tokens=6, do_sample=False))
