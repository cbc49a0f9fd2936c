"""Random models and filled caches: what they hold is what a real run would."""

import math
from typing import Any

import pytest
import torch

from quintet import AutoConfig, AutoModelForCausalLM
from quintet.errors import InputError
from quintet.measurement import synthetic
from quintet.measurement.geometries import GEOMETRIES, geometry
from quintet.measurement.synthetic import filled_cache, random_ids, random_model
from quintet.measurement.timing import Spread, time_prompt, time_steps

from .test_floors import DENSE, HYBRID, LATENT, MIXED, model_of

SMALL = {"qwen2": DENSE, "qwen2_moe": MIXED, "deepseek_v2": LATENT, "zamba2": HYBRID}


@pytest.mark.parametrize("model_type", SMALL)
def test_a_filled_cache_is_as_one_after_a_prompt(model_type: str) -> None:
    model = model_of(model_type, SMALL[model_type])
    with torch.no_grad():
        real = model(random_ids(100, 2, 20), use_cache=True).past_key_values
        made = filled_cache(model, 2, 20)
        assert made.lengths(2).tolist() == real.lengths(2).tolist() == [20, 20]
        for index, slot in enumerate(real.layers):
            if slot is not None:
                for a, b in zip(real[index], made[index], strict=True):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype)
                    assert len(b[0, 0].unique(dim=0)) == 20
        for a, b in zip(real.states, made.states, strict=True):
            assert (a.state.shape, a.window.shape) == (b.state.shape, b.window.shape)


@pytest.mark.parametrize("model_type", SMALL)
def test_a_random_model_has_the_tensors_of_a_fresh_one(model_type: str) -> None:
    made = model_of(model_type, SMALL[model_type], torch.bfloat16)
    fresh = AutoModelForCausalLM.from_config(made.config, dtype="bfloat16")
    assert {n: (x.shape, x.dtype) for n, x in made.state_dict().items()} == {
        n: (x.shape, x.dtype) for n, x in fresh.state_dict().items()
    }
    assert made.num_parameters() == fresh.num_parameters()
    assert all(x.isfinite().all() for x in made.state_dict().values())
    assert not made.training


def test_no_two_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = [value for one in GEOMETRIES.values() for value in vars(one.config()).values()]
    sizes = [width for width in widths if type(width) is int and width > 1]
    assert all(math.gcd(synthetic._DRAWN, size) == 1 for size in sizes)
    # Fewer numbers than the matrix has: repeated, they stand elsewhere in each row.
    monkeypatch.setattr(synthetic, "_DRAWN", 101)
    weight = model_of("qwen2", DENSE).get_parameter("model.embed_tokens.weight")
    assert len(weight.unique(dim=0)) == 100


def test_ids_are_the_same_for_the_same_seed() -> None:
    assert torch.equal(random_ids(50, 2, 9, seed=3), random_ids(50, 2, 9, seed=3))
    assert not torch.equal(random_ids(50, 2, 9, seed=3), random_ids(50, 2, 9, seed=4))


# Read tokens as the published models are described, in millions.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("qwen2-0.5b", 494),
        ("deepseek-v2-lite-6l", 3400),
        ("qwen1.5-moe-a2.7b-6l", 4050),
        ("zamba2-1.2b", 1215),
    ],
)
def test_a_geometry_has_its_size(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry(name).config())
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


def test_an_unknown_geometry_is_refused() -> None:
    with pytest.raises(InputError, match="there are qwen2"):
        geometry("qwen2")
    assert set(GEOMETRIES) >= {"deepseek-v3-2l-64e"}


def test_steps_run_behind_the_depth(monkeypatch: Any) -> None:
    model = random_model(AutoConfig.for_model("qwen2", **DENSE), torch.float32)
    seen: list[tuple[int, ...]] = []

    def note(module: Any, arguments: Any, options: Any, output: Any) -> None:
        seen.append((*arguments[0].shape, options["past_key_values"].get_seq_length()))

    handle = model.register_forward_hook(note, with_kwargs=True)
    assert time_steps(model, 2, 30, steps=3) > 0
    # One that fills, one that does not count, three that do.
    assert seen == [(2, 1, 1), (2, 1, 31), (2, 1, 32), (2, 1, 33), (2, 1, 34)]
    handle.remove()
    assert time_prompt(model, 2, 30) > 0


def test_a_step_that_takes_long_is_the_last() -> None:
    model = model_of("qwen2", DENSE)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert time_steps(model, 1, 5, steps=50, limit=0.0) > 0
    assert len(calls) == 3


def test_a_spread_is_told_by_its_middle_and_ends() -> None:
    spread = Spread.of([5.0, 1.0, 2.0])
    assert (spread.median, spread.least, spread.most) == (2.0, 1.0, 5.0)
