"""What forward promises apart from parity: caches, arguments, outputs, training."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from quintet import (
    Cache,
    DynamicCache,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    StaticCache,
)
from quintet.errors import ContextLengthError, InputError
from support import relative_error, small_config

TOLERANCE = 1e-5
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = [
    pytest.param({}, id="full"),
    pytest.param(SLIDING, id="sliding"),
    pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, id="linear"),
    pytest.param({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, id="dynamic"),
    pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, id="yarn"),
    pytest.param({"rope_scaling": LLAMA3}, id="llama3"),
]


def model_of(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(small_config(**changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model


def caches(model: Qwen2ForCausalLM) -> dict[str, Cache]:
    return {
        "growing": DynamicCache(model.config),
        "preallocated": StaticCache(model.config, max_cache_len=40),
    }


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("changes", VARIANTS)
def test_prefill_and_steps_equal_one_forward(
    changes: dict[str, Any], kind: str, backend: str
) -> None:
    model = model_of(**changes, attn_implementation=backend)
    ids = torch.randint(101, (2, 20))
    whole = model(ids, use_cache=False).logits
    cache = caches(model)[kind]
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 15), (15, 20)):
        out = model(ids[:, start:stop], past_key_values=cache)
        assert out.past_key_values is cache
        parts.append(out.logits)
    assert cache.get_seq_length() == 20
    assert relative_error(torch.cat(parts, dim=1), whole) < TOLERANCE


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from(["growing", "preallocated"]),
    sliding=st.booleans(),
)
def test_ragged_rows_equal_rows_alone_in_any_split(
    data: st.DataObject, kind: str, sliding: bool
) -> None:
    """Padding anywhere, several forwards: each row is what it is by itself."""
    model = model_of(**(SLIDING if sliding else {}))
    cache = caches(model)[kind]
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
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_going_back_and_on_is_as_if_never_gone(kind: str) -> None:
    model = model_of()
    ids, other = torch.randint(101, (2, 12)), torch.randint(101, (2, 5))
    cache = caches(model)[kind]
    model(ids, past_key_values=cache)
    model(other, past_key_values=cache)
    cache.crop(12)
    again = model(other[:, :3], past_key_values=cache).logits
    whole = model(torch.cat((ids, other[:, :3]), dim=1), use_cache=False).logits
    assert relative_error(again, whole[:, 12:]) < TOLERANCE
    # The same by naming the slots to write.
    moved = model(other[:, :3], past_key_values=cache, cache_position=torch.arange(12, 15))
    assert relative_error(moved.logits, whole[:, 12:]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_legacy_tuples_are_taken_and_given_back(padded: bool) -> None:
    model = model_of()
    ids = torch.randint(101, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    past: Any = tuple((torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16)) for _ in range(3))
    steps = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past)
        past = out.past_key_values
        assert isinstance(past, tuple)
        assert past[0][0].shape == (2, 2, stop, 16)
        steps.append(out.logits)
    whole = model(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert relative_error(torch.cat(steps, dim=1)[kept], whole[kept]) < TOLERANCE


@torch.no_grad()
def test_a_callers_own_4d_mask_is_used_as_it_is() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 6))
    seen = torch.ones(6, 6).tril().bool()
    seen[4, 1] = False
    boolean = model(ids, attention_mask=seen[None, None]).logits
    added = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert relative_error(model(ids, attention_mask=added).logits, boolean) < TOLERANCE
    plain = model(ids).logits
    assert relative_error(boolean[:, :4], plain[:, :4]) < TOLERANCE
    assert relative_error(boolean[:, 4:], plain[:, 4:]) > 1e-3


@torch.no_grad()
def test_outputs_index_like_tuples_and_dicts() -> None:
    model = model_of()
    ids = torch.randint(101, (1, 5))
    out = model(ids, labels=ids, output_hidden_states=True)
    assert out[0] is out.loss is out["loss"]
    assert out[1] is out.logits
    assert list(out) == ["loss", "logits", "past_key_values", "hidden_states"]
    assert out[:2] == (out.loss, out.logits)
    assert "attentions" not in out
    with pytest.raises(KeyError):
        out["attentions"]
    plain = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 4
    assert torch.equal(plain[1], out.logits)
    assert isinstance(model_of(return_dict=False)(ids), tuple)


@torch.no_grad()
def test_logits_to_keep_takes_counts_and_positions() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 9))
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    places = torch.tensor([1, 5, 6])
    assert torch.allclose(model(ids, logits_to_keep=places).logits, whole[:, places], atol=1e-6)


@torch.no_grad()
def test_inputs_embeds_stand_for_ids() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 5))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, frugal = model_of().train(), model_of().train()
    frugal.gradient_checkpointing_enable()
    assert frugal.is_gradient_checkpointing
    ids = torch.randint(101, (2, 9))
    for model in (plain, frugal):
        model(ids, labels=ids).loss.backward()
    for (name, mine), other in zip(frugal.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


def test_training_learns_a_sequence_by_heart() -> None:
    model = model_of(attention_dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(1, 17)[None]
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    model.eval()
    assert model.generate(ids[:, :4], max_new_tokens=12).tolist() == ids.tolist()


def test_attention_dropout_acts_in_training_alone() -> None:
    for backend in ("eager", "sdpa"):
        model = model_of(attention_dropout=0.5, attn_implementation=backend)
        ids = torch.randint(101, (1, 8))
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_preallocated_decode_step_compiles_once() -> None:
    model = model_of()
    cache = StaticCache(model.config, max_cache_len=64)
    ids = torch.randint(101, (2, 40))
    model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    outs = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 40)]
    assert counter.frame_count == 1
    whole = model(ids, use_cache=False).logits
    assert relative_error(torch.cat(outs, dim=1), whole[:, 8:]) < TOLERANCE


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        pytest.param({}, ["exactly one of input_ids and inputs_embeds"], id="nothing"),
        pytest.param({"input_ids": [[5, 101]]}, ["[0, 1]", "101", "0 to 100"], id="id-high"),
        pytest.param({"input_ids": [[-1]]}, ["-1", "0 to 100"], id="id-negative"),
        pytest.param({"input_ids": [[]]}, ["(1, 0)", "no token"], id="empty"),
        pytest.param({"input_ids": [3, 4]}, ["(2,)", "(batch, tokens)"], id="one-axis"),
        pytest.param(
            {"input_ids": [[1, 2]], "attention_mask": [[1]]}, ["(1, 1)", "(1, 2)"], id="mask"
        ),
        pytest.param({"input_ids": [[1, 2]], "labels": [[1]]}, ["(1, 1)", "(1, 2)"], id="labels"),
        pytest.param({"input_ids": [[1, 2]], "labels": [[1, 101]]}, ["101"], id="label-high"),
        pytest.param({"input_ids": [[1, 2]], "cache_position": [4, 5]}, ["starts at 4"], id="gap"),
        pytest.param({"input_ids": [[1, 2]], "cache_position": [0, 2]}, ["consecutive"], id="jump"),
    ],
)
def test_bad_input_is_named(inputs: dict[str, Any], words: list[str]) -> None:
    tensors = {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
    with pytest.raises(InputError) as caught:
        model_of()(**tensors)
    for word in words:
        assert word in str(caught.value)


@torch.no_grad()
def test_contradictions_between_mask_and_cache_are_named() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(InputError, match=r"\[6, 6\].*\[6, 4\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 7), past_key_values=cache)
    with pytest.raises(InputError, match="2 rows and the input has 3"):
        model(torch.randint(101, (3, 1)), past_key_values=cache)
    full = StaticCache(model.config, max_cache_len=6)
    model(ids, past_key_values=full)
    with pytest.raises(ContextLengthError, match="room for max_cache_len=6"):
        model(ids[:, :1], past_key_values=full)


def test_a_classifier_without_pad_token_takes_one_row() -> None:
    model = Qwen2ForSequenceClassification(small_config()).eval()
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2)
    with pytest.raises(InputError, match="pad_token_id"):
        model(torch.tensor([[1, 2], [3, 4]]))
