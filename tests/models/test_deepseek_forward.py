"""What DeepSeek-V2 and -V3 promise apart from parity: caches, arguments, outputs, training."""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from models.deepseek_support import GROUPS, YARN, absorb, batch, config_of, model_of
from quintet import Cache, DynamicCache, StaticCache
from quintet.errors import InputError
from quintet.ops.mla import absorbs
from support import relative_error

TOLERANCE = 1e-5
KINDS = ["DeepseekV2", "DeepseekV3"]
VARIANTS = [
    pytest.param("DeepseekV2", {}, id="V2"),
    pytest.param("DeepseekV2", {"q_lora_rank": None, **GROUPS}, id="V2-groups-q-direct"),
    pytest.param("DeepseekV2", {"rope_scaling": YARN, "attention_bias": True}, id="V2-yarn"),
    pytest.param("DeepseekV2", {"num_experts_per_tok": None}, id="V2-dense"),
    pytest.param("DeepseekV3", {}, id="V3"),
    pytest.param("DeepseekV3", {"rope_interleave": False, "q_lora_rank": None}, id="V3-halves"),
    pytest.param("DeepseekV3", {"rope_scaling": YARN, "n_shared_experts": None}, id="V3-yarn"),
]


def caches(model: Any) -> dict[str, Cache]:
    return {
        "growing": DynamicCache(model.config),
        "preallocated": StaticCache(model.config, max_cache_len=40),
    }


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_prefill_and_steps_equal_one_forward(
    family: str, changes: dict[str, Any], kind: str, backend: str
) -> None:
    model = model_of(family, **changes, attn_implementation=backend)
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
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("family", KINDS)
def test_a_long_text_in_chunks_takes_both_ways(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = set()

    def noted(T: int, S: int) -> bool:
        ways.add(absorbs(T, S))
        return absorbs(T, S)

    monkeypatch.setattr("quintet.layers.mla.absorbs", noted)
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
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    family=st.sampled_from(KINDS),
    kind=st.sampled_from(["growing", "preallocated"]),
)
def test_ragged_rows_equal_rows_alone_in_any_split(
    data: st.DataObject, family: str, kind: str
) -> None:
    """Padding anywhere, several forwards: each row is what it is by itself."""
    model = model_of(family)
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
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_going_back_and_on_is_as_if_never_gone(kind: str, family: str) -> None:
    model = model_of(family)
    ids, other = torch.randint(101, (2, 12)), torch.randint(101, (2, 5))
    cache = caches(model)[kind]
    model(ids, past_key_values=cache)
    model(other, past_key_values=cache)
    cache.crop(12)
    again = model(other[:, :3], past_key_values=cache).logits
    whole = model(torch.cat((ids, other[:, :3]), dim=1), use_cache=False).logits
    assert relative_error(again, whole[:, 12:]) < TOLERANCE
    moved = model(other[:, :3], past_key_values=cache, cache_position=torch.arange(12, 15))
    assert relative_error(moved.logits, whole[:, 12:]) < TOLERANCE


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


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [True, False])
def test_a_callers_own_4d_mask_is_used_as_it_is(
    absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorb(monkeypatch, absorbed)
    model = model_of("DeepseekV2")
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
@pytest.mark.parametrize("family", KINDS)
def test_a_preallocated_decode_step_compiles_once(family: str) -> None:
    model = model_of(family)
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


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_outputs_index_like_tuples_and_dicts(family: str) -> None:
    model = model_of(family)
    ids = torch.randint(101, (1, 5))
    out = model(ids, labels=ids, output_hidden_states=True, output_router_logits=True)
    assert out[0] is out.loss is out["loss"]
    names = ["loss", "logits", "past_key_values", "hidden_states", "router_logits"]
    assert [name for name in out if name != "aux_loss"] == names
    assert len(out.hidden_states) == 4
    assert [x.shape for x in out.router_logits] == [(5, 8), (5, 8)]
    plain = model(ids, labels=ids, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 3
    assert torch.equal(plain[1], out.logits)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_logits_to_keep_and_inputs_embeds(family: str) -> None:
    model = model_of(family)
    ids = torch.randint(101, (2, 9))
    whole = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    places = torch.tensor([1, 5, 6])
    assert torch.allclose(model(ids, logits_to_keep=places).logits, whole[:, places], atol=1e-6)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, whole)


@pytest.mark.parametrize("family", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    plain, frugal = model_of(family).train(), model_of(family).train()
    frugal.gradient_checkpointing_enable()
    ids = torch.randint(101, (2, 9))
    for model in (plain, frugal):
        model(ids, labels=ids).loss.backward()
    for (name, mine), other in zip(frugal.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-7), name


@pytest.mark.parametrize("family", KINDS)
def test_training_learns_a_sequence_by_heart(family: str) -> None:
    model = model_of(family, attention_dropout=0.1).train()
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


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_alone(
    backend: str, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorb(monkeypatch, absorbed)
    model = model_of("DeepseekV2", attention_dropout=0.5, attn_implementation=backend)
    ids = torch.randint(101, (1, 8))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_be_resized(tied: bool, family: str) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    ids = torch.randint(101, (1, 6))
    before = model(ids).logits
    model.resize_token_embeddings(110)
    after = model(ids).logits
    assert after.shape[-1] == 110
    assert relative_error(after[..., :101], before) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_question_answering_reads_two_logits_off_each_state(family: str) -> None:
    model = model_of(family, "ForQuestionAnswering")
    ids, mask, _ = batch("left")
    states = model.transformer(ids, attention_mask=mask).last_hidden_state
    expected = states @ model.qa_outputs.weight.T + model.qa_outputs.bias
    starts = torch.tensor([8, 9, 900])
    made = model(ids, attention_mask=mask, start_positions=starts, end_positions=starts + 1)
    assert relative_error(made.start_logits, expected[..., 0]) < TOLERANCE
    assert relative_error(made.end_logits, expected[..., 1]) < TOLERANCE
    assert bool(made.loss.isfinite())


@torch.no_grad()
def test_token_classification_of_v2_reads_each_state() -> None:
    model = model_of("DeepseekV2", "ForTokenClassification", num_labels=5)
    ids, mask, _ = batch("right")
    states = model.model(ids, attention_mask=mask).last_hidden_state
    expected = states @ model.score.weight.T + model.score.bias
    labels = torch.randint(5, ids.shape)
    made = model(ids, attention_mask=mask, labels=labels)
    assert relative_error(made.logits, expected) < TOLERANCE
    wanted = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert relative_error(made.loss, wanted) < TOLERANCE


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


def test_an_unknown_argument_is_refused() -> None:
    model = model_of("DeepseekV3")
    with pytest.raises(TypeError, match="output_mtp_logit"):
        model(torch.tensor([[1]]), output_mtp_logit=True)
    with pytest.raises(InputError, match="exactly one"):
        model()
