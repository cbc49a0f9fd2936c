"""What Zamba2 promises apart from parity: padding, caches, heads, training, compiling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from models.zamba2_support import SHAPES, model_of, randomised, small_config
from quintet.cache import Cache, DynamicCache, StaticCache
from quintet.models.zamba2 import (
    Zamba2ForCausalLM,
    Zamba2ForQuestionAnswering,
    Zamba2ForSequenceClassification,
    Zamba2ForTokenClassification,
)
from support import relative_error

TOLERANCE = 1e-5
VARIANTS = [pytest.param(changes, id=name) for name, changes in SHAPES.items()]
KINDS = ["growing", "preallocated"]


def cache_of(model: Zamba2ForCausalLM, kind: str, room: int = 40) -> Cache:
    if kind == "growing":
        return DynamicCache(model.config)
    return StaticCache(model.config, max_cache_len=room)


def ids_of(B: int, T: int) -> Tensor:
    return torch.randint(1, 101, (B, T))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", VARIANTS)
def test_prefill_and_steps_equal_one_forward(
    changes: dict[str, Any], kind: str, backend: str
) -> None:
    # With the step sizes' usual lower limit, which holds in prompts and in steps.
    model = model_of(**changes, attn_implementation=backend, time_step_min=0.2, time_step_max=1.0)
    ids = ids_of(2, 30)
    whole = model(ids, use_cache=False).logits
    cache = cache_of(model, kind)
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 15), (15, 30)):
        out = model(ids[:, start:stop], past_key_values=cache)
        assert out.past_key_values is cache
        parts.append(out.logits)
    assert cache.get_seq_length() == 30
    assert relative_error(torch.cat(parts, dim=1), whole) < TOLERANCE


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), name=st.sampled_from(["7b", "bias"]))
def test_ragged_rows_equal_rows_alone_in_any_split(
    data: st.DataObject, kind: str, name: str
) -> None:
    """Padding anywhere, several forwards: each row is what it is by itself."""
    model = model_of(**SHAPES[name])
    cache = cache_of(model, kind)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    texts: list[list[int]] = [[], [], []]
    logits: list[list[Tensor]] = [[], [], []]
    whole = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(data.draw(st.integers(1, 4))):
        T = data.draw(st.integers(1, 6))
        ids = torch.randint(101, (3, T), generator=generator)
        mask = torch.rand(3, T, generator=generator) < 0.7
        if not texts[0]:
            mask |= torch.arange(T) == T - 1
        whole = torch.cat((whole, mask.long()), dim=1)
        out = model(ids, attention_mask=whole, past_key_values=cache)
        for row in range(3):
            texts[row] += ids[row, mask[row]].tolist()
            logits[row].append(out.logits[row, mask[row]])
    for row in range(3):
        alone = model(torch.tensor([texts[row]]), use_cache=False).logits[0]
        assert relative_error(torch.cat(logits[row]), alone) < TOLERANCE


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
@pytest.mark.parametrize("name", ["7b", "plain"])
def test_a_preallocated_decode_step_compiles_once(name: str) -> None:
    model = model_of(**SHAPES[name])
    cache = StaticCache(model.config, max_cache_len=64)
    ids = ids_of(2, 40)
    model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    outs = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 40)]
    assert counter.frame_count == 1
    whole = model(ids, use_cache=False).logits
    assert relative_error(torch.cat(outs, dim=1), whole[:, 8:]) < TOLERANCE


@torch.no_grad()
def test_a_compiled_step_takes_the_next_slot_and_no_other() -> None:
    model = model_of()
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
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_without_a_cache_is_the_same_text(kind: str) -> None:
    model = model_of(**SHAPES["7b"])
    ids, mask = ids_of(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    chosen = {} if kind == "dynamic" else {"cache_implementation": "static"}
    made = model.generate(ids, attention_mask=mask, max_new_tokens=12, **chosen)
    slow = model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=False)
    assert torch.equal(made, slow)


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


@torch.no_grad()
def test_outputs_and_inputs_take_their_other_forms() -> None:
    model = model_of()
    ids = ids_of(1, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    out = model(ids, labels=ids, output_hidden_states=True)
    plain = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[1], out.logits)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], embeds)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, frugal = model_of(**SHAPES["7b"]).train(), model_of(**SHAPES["7b"]).train()
    frugal.gradient_checkpointing_enable()
    ids = ids_of(2, 19)
    for model in (plain, frugal):
        model(ids, labels=ids).loss.backward()
    for (name, mine), other in zip(frugal.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


def test_training_learns_a_sequence_by_heart() -> None:
    model = model_of(**SHAPES["7b"], attention_dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(3, 19)[None]
    for _ in range(90):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    model.eval()
    assert model.generate(ids[:, :4], max_new_tokens=12).tolist() == ids.tolist()


def test_attention_dropout_acts_in_training_alone() -> None:
    model = model_of(attention_dropout=0.5)
    ids = ids_of(1, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


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


@torch.no_grad()
def test_tied_embeddings_follow_a_new_vocabulary() -> None:
    model = model_of()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(110)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(ids_of(1, 3)).logits.shape == (1, 3, 110)


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


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "cls",
    [Zamba2ForTokenClassification, Zamba2ForQuestionAnswering, Zamba2ForSequenceClassification],
)
def test_every_head_sees_rows_as_if_alone(cls: type, padding: str) -> None:
    torch.manual_seed(1)
    model = randomised(cls(small_config(num_labels=3)).eval())
    ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    columns = slice(0, 4) if padding == "left" else slice(5, 9)
    mask[1, columns] = 0
    ids = ids.masked_fill(mask == 0, 0)
    names = ["start_logits", "end_logits"] if cls is Zamba2ForQuestionAnswering else ["logits"]
    together = model(ids, attention_mask=mask)
    for row in range(2):
        alone = model(ids[row, mask[row].bool()][None])
        for name in names:
            made = together[name][row]
            if cls is not Zamba2ForSequenceClassification:
                made = made[mask[row].bool()]
            assert relative_error(made, alone[name][0]) < TOLERANCE
    sum(together[name].sum() for name in names).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_a_model_without_conv_bias_has_none(tmp_path: Path) -> None:
    model = model_of(use_conv_bias=False)
    assert not any("conv1d.bias" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    ids = ids_of(1, 5)
    assert torch.equal(Zamba2ForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_scalars_of_state_spaces_are_loaded_as_float32(tmp_path: Path) -> None:
    model_of().bfloat16().save_pretrained(tmp_path)
    loaded = Zamba2ForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    mixer = loaded.model.layers[0].mamba
    assert {x.dtype for x in (mixer.A_log, mixer.D, mixer.dt_bias)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == loaded.dtype == torch.bfloat16
    assert loaded(ids_of(1, 5)).logits.isfinite().all()
