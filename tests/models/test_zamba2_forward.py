"""What is Zamba2's alone: padding, shared blocks, step sizes, scalars of state spaces."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from families.zamba2 import SHAPES, model_of, small_config
from quintet.cache import StaticCache
from quintet.models.zamba2 import Zamba2ForCausalLM
from support import relative_error

TOLERANCE = 1e-5
VARIANTS = [pytest.param(changes, id=name) for name, changes in SHAPES.items()]


def ids_of(B: int, T: int) -> Tensor:
    return torch.randint(1, 101, (B, T))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_a_padded_prompt_continues_as_one_without(changes: dict[str, Any], side: str) -> None:
    """Transformers differs: biases leak into left-padded rows, right padding into the cache."""
    model = model_of(**changes)
    ids, mask = ids_of(2, 12), torch.ones(2, 12, dtype=torch.long)
    columns = slice(0, 5) if side == "left" else slice(7, 12)
    mask[1, columns] = 0
    more = ids_of(2, 1)
    cache = model(ids, attention_mask=mask).past_key_values
    logits = model(more, past_key_values=cache).logits
    for row in range(2):
        text = torch.cat((ids[row, mask[row].bool()], more[row]))[None]
        alone = model(text, use_cache=False).logits[0, -1]
        assert relative_error(logits[row, 0], alone) < TOLERANCE


@torch.no_grad()
def test_a_compiled_step_takes_the_next_slot_and_no_other() -> None:
    model = model_of(num_hidden_layers=2, layers_block_type=["mamba", "hybrid"])
    cache = StaticCache(model.config, max_cache_len=16)
    ids = ids_of(1, 12)
    model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    step = torch.compile(model, backend=CompileCounter(), fullgraph=True)
    whole = model(ids, use_cache=False).logits
    for at in (8, 9):
        place = torch.tensor([at])
        out = step(ids[:, at : at + 1], past_key_values=cache, cache_position=place)
        assert relative_error(out.logits[:, 0], whole[:, at]) < TOLERANCE
    with pytest.raises(RuntimeError, match="has to be the next slot"):
        step(ids[:, 4:5], past_key_values=cache, cache_position=torch.tensor([4]))


@torch.no_grad()
def test_logits_to_keep_is_the_callers_choice() -> None:
    model = model_of(num_logits_to_keep=1)
    ids = ids_of(2, 9)
    whole = model(ids).logits
    assert whole.shape == (2, 9, 101)
    assert relative_error(model(ids, logits_to_keep=2).logits, whole[:, -2:]) < TOLERANCE
    places = torch.tensor([1, 5, 6])
    assert relative_error(model(ids, logits_to_keep=places).logits, whole[:, places]) < TOLERANCE
    assert model_of(num_logits_to_keep=None).config.num_logits_to_keep is None


def test_shared_blocks_are_one_and_stay_one() -> None:
    model = model_of(**SHAPES["7b"])
    layers = model.model.layers
    assert layers[0].shared_transformer is layers[3].shared_transformer
    assert layers[2].shared_transformer is layers[5].shared_transformer
    assert layers[0].shared_transformer is not layers[2].shared_transformer
    down = "shared_transformer.feed_forward.down_proj.weight"
    assert model.get_parameter(f"model.layers.3.{down}").requires_grad
    assert f"model.layers.3.{down}" in model.state_dict()
    assert f"model.layers.3.{down}" not in dict(model.named_parameters())
    model.double()
    assert layers[0].shared_transformer is layers[3].shared_transformer
    adapters = layers[0].shared_transformer.feed_forward.gate_up_proj_adapter_list
    assert list(adapters) == ["0", "2"]


def test_other_weights_for_one_call_are_taken_back_from_shared_blocks() -> None:
    model = model_of(**SHAPES["7b"])
    ids = torch.randint(1, 101, (1, 5))
    plain, own = model(ids).logits, dict(model.named_parameters())
    other = {name: parameter.detach() * 0.9 for name, parameter in own.items()}
    other["lm_head.weight"] = other["model.embed_tokens.weight"]
    changed = torch.func.functional_call(model, other, (ids,), tie_weights=False).logits
    twin = copy.deepcopy(model)
    twin.load_state_dict(other, strict=False)
    assert relative_error(changed, twin(ids).logits) < TOLERANCE
    assert not torch.equal(changed, plain)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())


def test_fresh_state_spaces_have_step_sizes_in_their_range() -> None:
    torch.manual_seed(0)
    config = small_config(time_step_min=0.001, time_step_max=0.1, n_mamba_heads=64)
    mixer = Zamba2ForCausalLM(config).model.layers[0].mamba
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.001 * 0.99 < steps.min() < 0.01
    assert 0.02 < steps.max() < 0.1 * 1.01
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 65.0))
    assert torch.equal(mixer.D, torch.ones(64))


def test_a_step_size_limit_of_the_config_counts_everywhere() -> None:
    ids = ids_of(1, 20)
    free = model_of()(ids).logits
    limited = model_of(time_step_limit=(0.2, 0.3))
    assert relative_error(limited(ids).logits, free) > 1e-3
    with torch.no_grad():
        cache = limited(ids[:, :10]).past_key_values
        steps = [limited(ids[:, i : i + 1], past_key_values=cache).logits for i in range(10, 20)]
    assert relative_error(torch.cat(steps, dim=1), limited(ids).logits[:, 10:]) < TOLERANCE
    open_ended = model_of(time_step_limit=(1e-7, float("inf")))
    assert torch.equal(open_ended(ids).logits, free)


@torch.no_grad()
def test_a_model_without_conv_bias_has_none(tmp_path: Path) -> None:
    model = model_of(use_conv_bias=False)
    assert not any("conv1d.bias" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    ids = ids_of(1, 5)
    assert torch.equal(Zamba2ForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_scalars_of_state_spaces_are_loaded_as_float32(tmp_path: Path) -> None:
    model = model_of().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = Zamba2ForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    mixer = loaded.model.layers[0].mamba
    assert {x.dtype for x in (mixer.A_log, mixer.D, mixer.dt_bias)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == loaded.dtype == torch.bfloat16
    ids = ids_of(1, 5)
    assert relative_error(loaded(ids).logits, model(ids).logits) < 0.03
