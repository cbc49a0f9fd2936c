"""What has to be the same in every family however the tokens of a text come in.

The examples are the same at every run: where two experts are as good as equal, rounding decides
which one a token takes, and one in some thousand texts is such a case.
"""

import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from comparisons import PADDING, TOLERANCE, batch
from conformance.families import HEADS, Family, each, each_head, each_variant
from quintet import Cache, DynamicCache, StaticCache
from support import relative_error

KINDS = st.sampled_from(["growing", "preallocated"])
WAYS = st.sampled_from(["eager", "sdpa"])
SEEDS = st.integers(0, 2**30)
# Of each variant, of which a family has a dozen: how texts are cut is one thing for all of them.
EXAMPLES = int(os.environ.get("QUINTET_EXAMPLES", "3"))


@cache
def fixed(family: Family, variant: str, backend: str = "sdpa") -> Any:
    """A model that no test changes."""
    return family.model_of(**family.variants[variant], attn_implementation=backend)


def cache_of(model: Any, kind: str, room: int = 40) -> Cache:
    if kind == "growing":
        return DynamicCache(model.config)
    return StaticCache(model.config, max_cache_len=room)


def ids_of(seed: int, B: int, T: int) -> Tensor:
    return torch.randint(101, (B, T), generator=torch.Generator().manual_seed(seed))


# -- one text, however it is cut -------------------------------------------------------------


@torch.no_grad()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 25), max_size=6), backend=WAYS, seed=SEEDS)
@each_variant(but="splits")
def test_prefill_in_any_split_is_one_prefill(
    family: Family, variant: str, cuts: set[int], backend: str, seed: int
) -> None:
    model = fixed(family, variant, backend)
    ids = ids_of(seed, 2, 26)
    whole = model(ids, use_cache=False).logits
    made = []
    for kind in ("growing", "preallocated"):
        past = cache_of(model, kind)
        parts = []
        for start, stop in pairwise([0, *sorted(cuts), 26]):
            out = model(ids[:, start:stop], past_key_values=past)
            assert out.past_key_values is past
            parts.append(out.logits)
        assert past.get_seq_length() == 26
        made.append(torch.cat(parts, dim=1))
        assert relative_error(made[-1], whole) < TOLERANCE, kind
    assert relative_error(*made) < TOLERANCE


@torch.no_grad()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), kind=KINDS, seed=SEEDS)
@each_variant(but="splits")
def test_ragged_rows_are_rows_alone(
    family: Family, variant: str, lengths: list[int], kind: str, seed: int
) -> None:
    """Padding anywhere, several forwards: each row is what it is by itself."""
    model = fixed(family, variant)
    past = cache_of(model, kind)
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = [[], [], []]
    logits: list[list[Tensor]] = [[], [], []]
    whole = torch.zeros(3, 0, dtype=torch.long)
    for T in lengths:
        ids = torch.randint(101, (3, T), generator=generator)
        mask = torch.rand(3, T, generator=generator) < 0.7
        if not texts[0]:
            mask |= torch.arange(T) == T - 1
        whole = torch.cat((whole, mask.long()), dim=1)
        out = model(ids, attention_mask=whole, past_key_values=past)
        for row in range(3):
            texts[row] += ids[row, mask[row]].tolist()
            logits[row].append(out.logits[row, mask[row]])
    for row in range(3):
        alone = model(torch.tensor([texts[row]]), use_cache=False).logits[0]
        assert relative_error(torch.cat(logits[row]), alone) < TOLERANCE


@pytest.mark.parametrize("padding", PADDING[1:])
@each_head
def test_every_head_sees_rows_as_if_alone(family: Family, head: str, padding: str) -> None:
    model = family.model_of(head, num_labels=3, pad_token_id=0)
    ids, mask, _ = batch(padding, T=9)
    ids = ids.masked_fill(mask == 0, 0)
    names = {"Model": ["last_hidden_state"], "ForQuestionAnswering": ["start_logits", "end_logits"]}
    together = model(ids, attention_mask=mask)
    for row in range(len(ids)):
        kept = mask[row].bool()
        alone = model(ids[row, kept][None])
        for name in names.get(head, ["logits"]):
            made = together[name][row]
            made = made if head == "ForSequenceClassification" else made[kept]
            assert relative_error(made, alone[name][0]) < TOLERANCE


@torch.no_grad()
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), kind=KINDS, seed=SEEDS)
@each_variant(thorough=True)
def test_going_back_and_on_is_as_if_never_gone(
    family: Family, variant: str, data: st.DataObject, kind: str, seed: int
) -> None:
    model = fixed(family, variant)
    past = cache_of(model, kind)
    prompt, taken = data.draw(st.integers(5, 10)), data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(0, taken - 1))
    ids, other, more = ids_of(seed, 3, prompt), ids_of(seed + 1, 3, taken), ids_of(seed + 2, 3, 3)
    how = data.draw(st.sampled_from(["length", "from-the-end", "row-lengths", "slots"]))
    mask = torch.ones(3, prompt, dtype=torch.long)
    if how in ("from-the-end", "row-lengths"):
        mask[1, :3], mask[2, -2:] = 0, 0
    model(ids, attention_mask=mask, past_key_values=past)
    past.snapshot()
    model(other, past_key_values=past)
    place = None
    if how == "length":
        past.crop(prompt + kept)
    elif how == "from-the-end":
        past.crop(kept - taken)
    elif how == "row-lengths":
        past.crop(mask.sum(dim=1) + kept)
    else:
        place = torch.arange(prompt + kept, prompt + kept + 3)
    made = model(more, past_key_values=past, cache_position=place).logits
    for row in range(3):
        text = torch.cat((ids[row, mask[row].bool()], other[row, :kept], more[row]))[None]
        alone = model(text, use_cache=False).logits[0, -3:]
        assert relative_error(made[row], alone) < TOLERANCE


@torch.no_grad()
@each_variant(thorough=True)
def test_generation_without_a_cache_is_the_same_text(family: Family, variant: str) -> None:
    model = family.model_of(
        **family.variants[variant], initializer_range=0.2, eos_token_id=None, pad_token_id=0
    )
    ids, mask, _ = batch("left", T=9)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    slow = model.generate(ids, use_cache=False, **options)
    for kind in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=kind, **options), slow)


# -- compiling -------------------------------------------------------------------------------


@torch.no_grad()
@each
def test_a_preallocated_decode_step_compiles_once(family: Family) -> None:
    """With all it is asked for besides; plain steps are those of tests/generation."""
    routed = bool(family.compared)
    asked = {"output_router_logits": True} if routed else {}
    model = family.model_of(**{**family.variants[family.thorough[1]], **family.shallow})
    past = StaticCache(model.config, max_cache_len=32)
    ids, mask = ids_of(0, 2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=past)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    outs = [step(ids[:, i : i + 1], past_key_values=past, **asked) for i in range(8, 20)]
    assert counter.frame_count == 1
    whole = model(ids, attention_mask=mask, use_cache=False, **asked)
    logits = torch.cat([out.logits for out in outs], dim=1)
    assert relative_error(logits, whole.logits[:, 8:]) < TOLERANCE
    if routed:
        for layer, told in enumerate(whole.router_logits):
            made = torch.stack([out.router_logits[layer] for out in outs], dim=1)
            assert relative_error(made, told.unflatten(0, (2, 20))[:, 8:]) < TOLERANCE


# -- files -----------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    data=st.data(),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.integers(2_000, 200_000),
)
@each
def test_loading_what_was_saved_is_the_identity(
    family: Family,
    data: st.DataObject,
    head: str,
    dtype: torch.dtype,
    shard: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    variant = data.draw(st.sampled_from(sorted(family.variants)))
    model = family.model_of(head, **family.variants[variant], num_labels=3).to(dtype)
    first, second = (tmp_path_factory.mktemp("checkpoint") for _ in range(2))
    model.save_pretrained(first, max_shard_size=shard)
    back = family.cls(head).from_pretrained(first)
    assert_same(back.state_dict(), model.state_dict(), dtype, model.keep_in_fp32)
    back.save_pretrained(second, max_shard_size=shard)
    assert_same(tensors_in(second), tensors_in(first), dtype, model.keep_in_fp32)
    assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()


def assert_same(
    after: dict[str, Tensor], before: dict[str, Tensor], dtype: torch.dtype, exact: tuple[str, ...]
) -> None:
    """Compare names, shapes and bytes; what ends as `exact` does is float32 once it was loaded."""
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == (torch.float32 if name.endswith(exact) else dtype), name
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name


def tensors_in(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return dict(sorted(tensors.items()))
