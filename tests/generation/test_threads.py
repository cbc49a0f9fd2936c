"""Generations by one model at once: each is what it is alone, and leaves nothing behind."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.families import Family, each
from quintet import DynamicCache
from support import relative_error

WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"head_dim": 16},
    "qwen2-moe": {"head_dim": 16},
    "zamba2": {"hidden_size": 64, "mamba_d_state": 16},
    "deepseek-v2": {"kv_lora_rank": 32},
    "deepseek-v3": {"kv_lora_rank": 32, "num_nextn_predict_layers": 2},
}
IDS = torch.arange(20)[None]
OTHER = torch.arange(7, 27).view(2, 10)


def model_of(family: Family) -> Any:
    model = family.model_of(**WIDE[family.name])
    # No row ends early, so that steps can be counted.
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16) if family.prefix.startswith("Deepseek") else model


def generate(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    made: Tensor = model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, **options})
    return made


class Between:
    """Lets another thread do something between two steps of this one, from start to end."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act
        self.errors: list[BaseException] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thread = threading.Thread(target=self.run)
        thread.start()
        thread.join()
        return scores

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self.errors.append(error)


def assert_free(model: nn.Module) -> None:
    """No generation left a hook, or anything else, on the model."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    names = set(vars(model)) | set(vars(model.base_model))
    assert not {name for name in names if "held" in name or "kept" in name or "seen" in name}


def step_of_its_own(model: Any) -> Tensor:
    cache = DynamicCache(model.config)
    with torch.no_grad():
        model(OTHER, past_key_values=cache)
        logits: Tensor = model(OTHER[:, :1], past_key_values=cache).logits
    return logits


def ways_of(model: Any) -> dict[str, dict[str, Any]]:
    """How this model can generate."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": model},
        "beams": {"num_beams": 2},
    }
    if model.config.model_type == "deepseek_v3":
        ways["mtp"] = {"use_mtp": True, "num_assistant_tokens": 3}
    return ways


@each
def test_a_generation_is_not_changed_by_another_between_its_steps(family: Family) -> None:
    model = model_of(family)
    ways = ways_of(model)
    alone = {name: generate(model, max_new_tokens=4, **ways[name]) for name in ways}
    others = {name: generate(model, OTHER, **ways[name]) for name in ways}
    # Each way between the steps of itself and of the one before it.
    following = dict(zip(ways, [*list(ways)[1:], *list(ways)[:1]], strict=True))

    for name, options in ways.items():

        def act(names: tuple[str, ...] = (name, following[name])) -> None:
            for other in names:
                assert torch.equal(generate(model, OTHER, **ways[other]), others[other]), other

        between = Between(act)
        made = generate(model, logits_processor=[between], max_new_tokens=4, **options)
        assert not between.errors, (name, between.errors)
        assert torch.equal(made, alone[name]), name
    assert_free(model)


@each
def test_hooks_and_weights_of_another_thread_are_its_own(family: Family) -> None:
    model = model_of(family)
    alone, before = generate(model), step_of_its_own(model)
    norm = model.base_model.layers[0].input_layernorm
    weight = norm.weight

    def act() -> None:
        calls: list[None] = []
        handle = norm.register_forward_hook(lambda *_: calls.append(None))
        # Layers that are called one by one add in another order.
        bound = 0.05 if before.dtype == torch.bfloat16 else 1e-5
        assert relative_error(step_of_its_own(model), before) <= bound
        assert len(calls) == 2
        handle.remove()
        norm.weight = nn.Parameter(2 * weight.detach())
        assert not torch.equal(step_of_its_own(model), before)
        norm.weight = weight
        assert torch.equal(step_of_its_own(model), before)

    between = Between(act)
    made = generate(model, logits_processor=[between])
    assert not between.errors, between.errors
    assert torch.equal(made, alone)
    assert_free(model)


@each
def test_a_change_by_another_thread_is_seen_from_the_next_step_on(family: Family) -> None:
    model = model_of(family)
    layer = model.base_model.layers[1]
    calls: list[None] = []
    steps = 0

    def act() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            layer.register_forward_hook(lambda *_: calls.append(None))

    made = generate(model, logits_processor=[Between(act)], max_new_tokens=6)
    assert made.shape[1] == IDS.shape[1] + 6
    # Six tokens take a prompt and five steps, and the hook comes before the third of these.
    assert len(calls) == 3


@each
def test_generations_at_the_same_time_are_those_alone(family: Family) -> None:
    model = model_of(family)
    jobs = [{"ids": ids, **options} for options in ways_of(model).values() for ids in (IDS, OTHER)]
    alone = [generate(model, **job) for job in jobs]
    made: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def work(place: int) -> None:
        try:
            torch.set_num_threads(1)
            made[place] = generate(model, **jobs[place])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for place, expected in enumerate(alone):
        assert torch.equal(made[place], expected), jobs[place]
    assert_free(model)


@each
def test_a_generation_that_fails_leaves_nothing_behind(family: Family) -> None:
    model = model_of(family)

    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > IDS.shape[1] + 2:
            raise RuntimeError("halfway")
        return scores

    for name, options in ways_of(model).items():
        cache = DynamicCache(model.config)
        expected = generate(model, **options)
        with pytest.raises(RuntimeError, match="halfway"):
            generate(model, past_key_values=cache, logits_processor=[fail], **options)
        assert not cache.in_fused_session, name
        assert cache.fused_runs is None, name
        assert cache.seen is None, name
        assert torch.equal(generate(model, **options), expected), name
    assert_free(model)
