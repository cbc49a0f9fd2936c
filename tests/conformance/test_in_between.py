"""What somebody puts in between is obeyed for one token as for a prompt."""

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from conformance.families import Family, each, each_head
from quintet.errors import InputError
from quintet.layers.linear import Linear
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import PlainModule
from quintet.modeling.outputs import BaseModelOutputWithPast
from support import relative_error

# So that kernels' vectors are full and layers run in one call.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 16},
    "qwen2-moe": {"head_dim": 16},
    "zamba2": {"hidden_size": 64, "mamba_d_state": 16, "use_mem_rope": True},
    "deepseek-v2": {"kv_lora_rank": 32},
    "deepseek-v3": {"kv_lora_rank": 32, "num_nextn_predict_layers": 0},
}
IDS = torch.arange(2 * 21).view(2, 21)
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def small(family: Family) -> dict[str, Any]:
    """Changes that leave one layer of each kind; of those that share modules, two."""
    layers = {} if family.name == "zamba2" else family.shallow
    return {**layers, **WIDE[family.name], "pad_token_id": 0}


def model_of(family: Family, head: str = "ForCausalLM", **changes: Any) -> Any:
    return family.model_of(head, **{**small(family), **changes})


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The modules that a forward calls, by name; containers are not called."""
    return {n: m for n, m in model.named_modules() if n and not isinstance(m, CONTAINERS)}


@torch.no_grad()
def both(model: Any) -> tuple[Tensor, Tensor]:
    """The last logits of a prompt and one more token, in one forward and in two."""
    whole = model(IDS, use_cache=False).logits[:, -1]
    past = model(IDS[:, :-1], use_cache=True).past_key_values
    return whole, model(IDS[:, -1:], past_key_values=past).logits[:, -1]


def assert_obeyed(model: Any, plain: Tensor) -> None:
    """What was put in between changes something, and a step as much as a prompt."""
    whole, step = both(model)
    assert not torch.equal(whole, plain)
    assert relative_error(step, whole) <= 1e-5


def scaled(output: Any, factor: float = 0.75) -> Any:
    """An output with all floating-point numbers in it scaled."""
    if isinstance(output, tuple):
        return tuple(scaled(one, factor) for one in output)
    if isinstance(output, BaseModelOutputWithPast):
        return replace(output, last_hidden_state=output.last_hidden_state * factor)
    is_real = isinstance(output, Tensor) and output.is_floating_point()
    return output * factor if is_real else output


@each
def test_every_module_s_hooks_are_called_in_a_prompt_and_in_a_step(family: Family) -> None:
    model = model_of(family)
    with torch.no_grad():
        past = model(IDS[:, :-1], use_cache=True).past_key_values
    for name, module in parts_of(model).items():
        calls: list[str] = []
        before = module.register_forward_pre_hook(lambda *_, c=calls: c.append("before"))
        after = module.register_forward_hook(lambda *_, c=calls: c.append("after"))
        with torch.no_grad():
            model(IDS[:, :-1], use_cache=False)
            in_prompt = len(calls)
            model(IDS[:, -1:], past_key_values=copy.deepcopy(past))
        before.remove()
        after.remove()
        assert in_prompt == len(calls) - in_prompt > 0, name
        assert calls.count("before") == calls.count("after"), name


@each_head
def test_every_head_calls_the_hooks_of_all_modules(family: Family, head: str) -> None:
    model = model_of(family, head)
    missed = set(parts_of(model))
    for name, module in parts_of(model).items():
        module.register_forward_hook(lambda *_, name=name: missed.discard(name))
    with torch.no_grad():
        model(IDS)
    assert not missed


@each
def test_a_hook_that_replaces_an_output_is_obeyed_in_a_step(family: Family) -> None:
    model = model_of(family)
    plain, _ = both(model)
    for name, module in parts_of(model).items():
        handle = module.register_forward_hook(lambda m, given, output: scaled(output))
        whole, step = both(model)
        handle.remove()
        assert relative_error(step, whole) <= 1e-5, name
        assert not torch.equal(whole, plain), name


def scale_output(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda m, given, output: scaled(output))


def scale_input(module: nn.Module) -> Any:
    def hook(m: nn.Module, given: Any, named: dict[str, Any]) -> Any:
        if given:
            return (scaled(given[0]), *given[1:]), named
        return given, {**named, "hidden_states": scaled(named["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


# A convolution is not called there, and angles are complex numbers.
ELSEWHERE = {"zamba2": (".conv1d",), "deepseek-v2": ("rotary_emb",)}


@pytest.mark.parametrize("put", [scale_output, scale_input], ids=lambda f: f.__name__)
@each
def test_hooks_do_what_they_do_in_transformers(
    family: Family, put: Callable[[nn.Module], Any]
) -> None:
    ours, theirs = family.twins("ForCausalLM", small(family), "eager")
    there = dict(theirs.named_modules(remove_duplicate=False))
    everything = dict(ours.named_modules(remove_duplicate=False))
    plain, _ = both(theirs)
    compared = 0
    for name, module in parts_of(ours).items():
        if name not in there or name == "model" or name.endswith(ELSEWHERE.get(family.name, ())):
            continue
        if name.endswith("rotary_emb") and put is scale_input:
            # What positions are given by differs.
            continue
        # What layers share is one module here, and one for each of them there.
        names = [n for n, m in everything.items() if m is module and n in there]
        handles = [put(module), *(put(there[n]) for n in names)]
        for mine, reference in zip(both(ours), both(theirs), strict=True):
            assert relative_error(mine, reference) <= 1e-5, name
        for handle in handles:
            handle.remove()
        compared += 1
    assert compared > 8 * ours.config.num_hidden_layers
    assert torch.equal(both(theirs)[0], plain)


@each
def test_a_layer_that_returns_more_than_hidden_states_is_named(family: Family) -> None:
    model = model_of(family)
    model.model.layers[0].register_forward_hook(lambda module, given, output: (output,))
    for run in (
        lambda: model(IDS),
        lambda: model.generate(IDS, max_new_tokens=2),
    ):
        with pytest.raises(InputError, match=r"Layer returned a tuple, by a hook"):
            run()


class Adapted(nn.Module):
    """A low-rank addition to a map, with the weight of what is wrapped, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(0.2 * torch.randn(3, base.weight.shape[1]))
        self.up = nn.Parameter(0.2 * torch.randn(base.weight.shape[0], 3))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base_layer(x) + x @ self.down.mT @ self.up.mT
        return made


@contextmanager
def put(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Put a module in the place of another for a while."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, before)


@each
def test_an_adapter_on_a_map_is_what_merging_it_is(family: Family) -> None:
    model = model_of(family)
    plain, _ = both(model)
    names = [n for n, m in model.named_modules() if isinstance(m, Linear)]
    for name in names:
        if name == "lm_head" and model.config.tie_word_embeddings:
            # Merging would change the embedding, too.
            continue
        base = model.get_submodule(name)
        wrapper = Adapted(base)
        with put(model, name, wrapper):
            whole, step = both(model)
        held = base.weight.detach().clone()
        with torch.no_grad():
            base.weight += wrapper.up @ wrapper.down
        merged, merged_step = both(model)
        base.weight.data.copy_(held)
        assert relative_error(whole, merged) <= 2e-5, name
        assert relative_error(step, merged_step) <= 2e-5, name
        assert not torch.equal(whole, plain), name


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@each
def test_gradients_reach_an_adapter_in_a_prompt_and_in_a_step(family: Family, backend: str) -> None:
    model = model_of(family, attn_implementation=backend)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [n for n, m in model.named_modules() if type(m) is Linear and n != "lm_head"]
    adapters = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        adapters[name] = Adapted(model.get_submodule(name))
        setattr(model.get_submodule(parent), leaf, adapters[name])
    past = model(IDS[:, :-1], use_cache=True).past_key_values
    for logits in (
        model(IDS, use_cache=False).logits,
        model(IDS[:, -1:], past_key_values=past).logits,
    ):
        wrappers = list(adapters.values())
        grads = torch.autograd.grad(logits.square().sum(), [a.up for a in wrappers])
        for name, grad in zip(adapters, grads, strict=True):
            assert float(grad.abs().max()) > 0, name


class AdaptedEmbedding(Adapted):
    """A low-rank addition to the vectors of ids."""

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.base_layer(ids) + self.up[ids] @ self.down
        return made


@each
def test_an_adapter_on_the_embedding_is_what_merging_it_is(family: Family) -> None:
    model = model_of(family, tie_word_embeddings=False)
    plain, _ = both(model)
    base = model.get_input_embeddings()
    wrapper = AdaptedEmbedding(base)
    with put(model, "model.embed_tokens", wrapper):
        whole, step = both(model)
    with torch.no_grad():
        base.weight += wrapper.up @ wrapper.down
    merged, merged_step = both(model)
    assert relative_error(whole, merged) <= 1e-5
    assert relative_error(step, merged_step) <= 1e-5
    assert not torch.equal(whole, plain)


class Doubled(nn.Module):
    """What somebody wrapped, and whose output is doubled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def forward(self, *given: Any, **named: Any) -> Any:
        return scaled(self.inner(*given, **named), 2.0)


@each
def test_a_wrapped_norm_is_what_a_scaled_one_is(family: Family) -> None:
    model = model_of(family)
    names = [n for n, m in model.named_modules() if hasattr(m, "variance_epsilon")]
    assert names
    for name in names:
        norm = model.get_submodule(name)
        with put(model, name, Doubled(norm)):
            whole, step = both(model)
        norm.weight.data *= 2
        expected, expected_step = both(model)
        norm.weight.data /= 2
        assert relative_error(whole, expected) <= 1e-5, name
        assert relative_error(step, expected_step) <= 1e-5, name


@each
def test_a_class_s_forward_that_was_replaced_is_called(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    plain, _ = both(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, PlainModule)}
    assert {Linear, RMSNorm} < kinds  # type: ignore[operator]
    for kind in kinds:
        written = kind.forward

        def mine(self: Any, *given: Any, written: Any = written, **named: Any) -> Any:
            return scaled(written(self, *given, **named))

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", mine)
            assert_obeyed(model, plain)


def replace_forward(module: nn.Module) -> None:
    written = type(module).forward

    def mine(self: nn.Module, *given: Any, **named: Any) -> Any:
        return scaled(written(self, *given, **named))

    module.forward = types.MethodType(mine, module)  # type: ignore[method-assign]


def derive(module: nn.Module) -> None:
    kind: Any = type(module)

    class Own(kind):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            return scaled(super().forward(*given, **named))

    module.__class__ = Own


def call_otherwise(module: nn.Module) -> None:
    kind: Any = type(module)

    class Own(kind):  # type: ignore[misc]
        def __call__(self, *given: Any, **named: Any) -> Any:
            return scaled(super().__call__(*given, **named))

    module.__class__ = Own


class Smaller(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.75 * weight


def parametrized(module: nn.Module) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        parametrize.register_parametrization(module, name, Smaller())


def by_magnitude(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        weight_norm(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(0.75)
    else:
        parametrized(module)


def pruned(module: nn.Module) -> None:
    """What is cut off is taken out of the weight at every call, by a hook."""
    for name, weight in list(module.named_parameters(recurse=False)):
        kept = torch.arange(weight.numel()).view_as(weight) % 2
        prune.custom_from_mask(module, name, kept)


OF_WEIGHTS = (parametrized, by_magnitude, pruned)
WAYS = [replace_forward, derive, call_otherwise, *OF_WEIGHTS]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@each
def test_a_module_that_was_changed_is_called(
    family: Family, way: Callable[[nn.Module], None]
) -> None:
    model = model_of(family)
    plain, _ = both(model)
    # One of each class, of the last layer that has it.
    found = {type(m): n for n, m in model.named_modules() if isinstance(m, PlainModule)}
    for name in found.values():
        module = model.get_submodule(name)
        if way in OF_WEIGHTS and not list(module.parameters(recurse=False)):
            continue
        model = model_of(family)
        way(model.get_submodule(name))
        whole, step = both(model)
        assert relative_error(step, whole) <= 1e-5, name
        assert not torch.equal(whole, plain), name


@pytest.mark.parametrize("kind", [Linear, RMSNorm])
@each
def test_a_hook_on_all_modules_is_obeyed(family: Family, kind: type[nn.Module]) -> None:
    model = model_of(family)
    plain, _ = both(model)

    def hook(module: nn.Module, given: Any, output: Any) -> Any:
        return scaled(output) if isinstance(module, kind) else None

    handle = everywhere.register_module_forward_hook(hook)
    try:
        assert_obeyed(model, plain)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@each
def test_a_call_of_all_modules_that_was_replaced_is_obeyed(
    family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    plain, _ = both(model)
    written = getattr(nn.Module, name)

    def call(self: nn.Module, *given: Any, **named: Any) -> Any:
        made = written(self, *given, **named)
        return scaled(made) if isinstance(self, RMSNorm) else made

    monkeypatch.setattr(nn.Module, name, call)
    assert_obeyed(model, plain)
