"""Every family computes what Transformers computes, with the same weights.

Tolerances: docs/numerics.md. Where they differ on purpose: docs/compatibility.md, and
`Family.exceptions`; each exception has a test of our side in tests/models or tests/ops.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from comparisons import PADDING, TOLERANCE, assert_gradients_equal, batch, counted_labels
from conformance.families import FAMILIES, Family, each, each_variant
from support import relative_error

B, T = 3, 21
THERE = pytest.mark.parametrize(
    ("family", "head"),
    [pytest.param(f, head, id=f"{f.name}-{head}") for f in FAMILIES for head in f.heads_there],
)
CELLS = pytest.mark.parametrize(
    ("family", "variant", "padding", "way"),
    [
        pytest.param(family, variant, padding, way, id=f"{family.name}-{variant}-{padding}-{way}")
        for family in FAMILIES
        for variant in family.variants
        for padding, way in family.cells(variant)
    ],
)
WAYS = pytest.mark.parametrize(
    ("family", "way"),
    [pytest.param(f, way, id=f"{f.name}-{way}") for f in FAMILIES for way in f.ways],
)


@CELLS
def test_forward_and_gradients(
    family: Family, variant: str, padding: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = family.backend(way, monkeypatch)
    ours, theirs = family.twins("ForCausalLM", family.variants[variant], backend)
    ids, mask, extra = batch(padding)
    kept = mask.bool()
    inputs: dict[str, Any] = {"attention_mask": mask, "labels": counted_labels(ids, mask)}
    inputs["output_hidden_states"] = True
    routed = bool(family.compared) and (variant, "router_logits") not in family.exceptions
    if routed:
        inputs["output_router_logits"] = True

    told = theirs(ids, **inputs, **extra)
    made = ours(ids, **inputs)
    told.loss.backward()
    made.loss.backward()

    assert relative_error(made.logits[kept], told.logits[kept]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    for mine, other in zip(made.hidden_states, told.hidden_states, strict=True):
        assert relative_error(mine[kept], other[kept]) < TOLERANCE
    if routed:
        assert len(made.router_logits) == len(family.routes(ours.config))
        for mine, other in zip(made.router_logits, told.router_logits or (), strict=True):
            assert mine.shape == other.shape
            assert relative_error(mine[kept.flatten()], other[kept.flatten()]) < TOLERANCE
    if routed and "aux_loss" in family.compared:
        assert relative_error(made.aux_loss, told.aux_loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("padding", PADDING)
@WAYS
def test_attentions(
    family: Family, way: str, padding: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = family.backend(way, monkeypatch)
    ours, theirs = family.twins("ForCausalLM", family.variants[weighed(family)], backend)
    ids, mask, extra = batch(padding)
    inputs = {"attention_mask": mask, "output_attentions": True, "use_cache": use_cache}
    told, made = theirs(ids, **inputs, **extra).attentions, ours(ids, **inputs).attentions
    kept = mask.bool()
    assert len(made) == len(told) == len(family.attends(ours.config))
    for mine, other in zip(made, told, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@each
def test_attentions_of_a_cached_step(family: Family, padding: str) -> None:
    ours, theirs = family.twins("ForCausalLM", family.variants[family.thorough[0]], "sdpa")
    ids, mask, extra = batch(padding)
    past: Any = None
    other: Any = None
    for part in (slice(0, T - 1), slice(T - 1, T)):
        inputs = {"attention_mask": mask[:, : part.stop], "output_attentions": True}
        places = {key: value[:, part] for key, value in extra.items()}
        told = theirs(ids[:, part], past_key_values=other, use_cache=True, **inputs, **places)
        made = ours(ids[:, part], past_key_values=past, use_cache=True, **inputs)
        past, other = made.past_key_values, told.past_key_values
    for mine, weights in zip(made.attentions, told.attentions, strict=True):
        assert mine.shape == weights.shape == (B, ours.config.num_attention_heads, 1, T)
        assert relative_error(mine, weights) < TOLERANCE


def weighed(family: Family) -> str:
    """The variant whose attentions are compared: with a window, where there are windows."""
    return "sliding" if "sliding" in family.thorough else family.thorough[0]


@torch.no_grad()
@each_variant()
def test_prefill_and_cached_steps(family: Family, variant: str) -> None:
    ours, theirs = family.twins("ForCausalLM", family.variants[variant], "sdpa")
    ids, _, _ = batch("none")
    mine = other = None
    for start, stop in pairwise((0, 9, 10, 11, 16, 17, T)):
        told = theirs(ids[:, start:stop], past_key_values=other, use_cache=True)
        made = ours(ids[:, start:stop], past_key_values=mine, use_cache=True)
        mine, other = made.past_key_values, told.past_key_values
        assert relative_error(made.logits, told.logits) < TOLERANCE, start


ROUNDED = pytest.mark.parametrize(
    ("family", "variant", "way"),
    [
        pytest.param(family, variant, way, id=f"{family.name}-{variant}-{way}")
        for family in FAMILIES
        for variant in family.variants
        for way in (family.ways if variant in family.thorough else family.ways[:1])
    ],
)


@torch.no_grad()
@ROUNDED
def test_bfloat16_is_no_farther_from_the_truth(
    family: Family, variant: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = family.backend(way, monkeypatch)
    ours, theirs = family.twins(
        "ForCausalLM", {**family.variants[variant], **family.rounded}, backend
    )
    ids, mask, _ = batch("none")
    exact = theirs(ids, attention_mask=mask).logits
    told = theirs.bfloat16()(ids, attention_mask=mask).logits.float()
    made = ours.bfloat16()(ids, attention_mask=mask).logits.float()
    assert typical(made - exact, exact) < 1.5 * typical(told - exact, exact) + 2**-8
    assert typical(made - told, exact) < 0.05


def typical(error: Tensor, of: Tensor) -> float:
    """The root mean square over that of the whole: which rounding is the largest is chance."""
    return float(error.square().mean().sqrt() / of.square().mean().sqrt())


@torch.no_grad()
@each_variant(thorough=True)
def test_64_greedy_tokens(family: Family, variant: str) -> None:
    padding = "none" if (variant, "left") in family.exceptions else "left"
    changes = {"initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = family.twins("ForCausalLM", {**family.variants[variant], **changes}, "sdpa")
    ids, mask, _ = batch(padding)
    ids = ids.masked_fill(mask == 0, 0)
    options = {"attention_mask": mask, "max_new_tokens": 64, "do_sample": False}
    told = theirs.generate(ids, **options)
    assert told.shape == (B, T + 64)
    assert len(set(told[:, T:].flatten().tolist())) > 5
    for kind in ("dynamic", "static"):
        made = ours.generate(ids, cache_implementation=kind, **options)
        assert made.tolist() == told.tolist(), kind


# -- heads -----------------------------------------------------------------------------------


def having(head: str) -> pytest.MarkDecorator:
    """Run a test for the families whose head of that kind Transformers has too."""
    families = [family for family in FAMILIES if head in family.heads_there]
    return pytest.mark.parametrize("family", families, ids=str)


REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        pytest.param(REGRESSION, torch.tensor([0.5, -1.0, 2.0]), id="regression-1"),
        pytest.param(None, torch.tensor([0.5, -1.0, 2.0]), id="regression-inferred"),
        pytest.param(REGRESSION, torch.randn(B, 4), id="regression-4"),
        pytest.param(SINGLE, torch.tensor([3, 0, 1]), id="single"),
        pytest.param(None, torch.tensor([3, 0, 1]), id="single-inferred"),
        pytest.param(MULTI, torch.rand(B, 4).round(), id="multi"),
        pytest.param(None, torch.rand(B, 4).round(), id="multi-inferred"),
    ],
)
@each
def test_sequence_classification(
    family: Family, problem: str | None, labels: Tensor, padding: str
) -> None:
    count = 1 if labels.is_floating_point() and labels.ndim == 1 else 4
    changes = {"num_labels": count, "pad_token_id": 0, "problem_type": problem}
    ours, theirs = family.twins("ForSequenceClassification", changes, "sdpa")
    ids, mask, extra = batch(padding)
    ids = ids.masked_fill(mask == 0, 0)
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits, told.logits) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if "ForTokenClassification" in f.heads_there],
    ids=lambda f: f.name,
)
def test_token_classification(family: Family, padding: str) -> None:
    ours, theirs = family.twins("ForTokenClassification", {"num_labels": 5}, "sdpa")
    ids, mask, extra = batch(padding)
    labels = torch.randint(5, (B, T)).masked_fill(mask == 0, -100)
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits[mask.bool()], told.logits[mask.bool()]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("padding", PADDING)
@having("ForQuestionAnswering")
def test_question_answering(family: Family, padding: str) -> None:
    ours, theirs = family.twins("ForQuestionAnswering", {}, "sdpa")
    ids, mask, extra = batch(padding)
    told = theirs(ids, attention_mask=mask, **extra)
    made = ours(ids, attention_mask=mask)
    kept = mask.bool()
    for name in ("start_logits", "end_logits"):
        assert relative_error(made[name][kept], told[name][kept]) < TOLERANCE
    # The loss is over all columns: padding has logits too, which mean nothing on either side.
    if padding == "none":
        starts, ends = torch.tensor([8, 7, 900]), torch.tensor([9, 9, 900])
        told = theirs(ids, start_positions=starts.clone(), end_positions=ends.clone())
        made = ours(ids, start_positions=starts, end_positions=ends)
        told.loss.backward()
        made.loss.backward()
        assert relative_error(made.loss, told.loss) < TOLERANCE
        assert_gradients_equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
@each
def test_model_without_head(family: Family, padding: str) -> None:
    ours, theirs = family.twins("Model", {}, "sdpa")
    ids, mask, extra = batch(padding)
    asked = {"output_router_logits": True} if family.compared else {}
    told = theirs(ids, attention_mask=mask, **asked, **extra)
    made = ours(ids, attention_mask=mask, **asked)
    kept = mask.bool()
    assert relative_error(made[0][kept], told[0][kept]) < TOLERANCE
    for mine, other in zip(
        made.get("router_logits", ()), told.get("router_logits") or (), strict=True
    ):
        assert relative_error(mine[kept.flatten()], other[kept.flatten()]) < TOLERANCE
    assert list(made) == list(told)


# -- checkpoints -----------------------------------------------------------------------------


def names_in(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


EXCHANGED = pytest.mark.parametrize(
    ("family", "variant", "size"),
    [
        pytest.param(f, variant, size, id=f"{f.name}-{variant}-{label}")
        for f in FAMILIES
        for variant in f.variants
        for label, size in (("sharded", "40KB"), ("one-file", "5GB"))
        if label == "sharded" or variant in f.thorough
    ],
)


@torch.no_grad()
@EXCHANGED
def test_checkpoints_go_both_ways(family: Family, variant: str, size: str, tmp_path: Path) -> None:
    ours, theirs = family.twins("ForCausalLM", family.variants[variant], "sdpa")
    ids, _, _ = batch("none")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    taken = family.cls("ForCausalLM").from_pretrained(tmp_path / "theirs")
    assert_same_model(taken, ours, ids)

    ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
    there = getattr(transformers, f"{family.prefix}ForCausalLM")
    back, report = there.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert_same_model(back, theirs, ids)
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        files = len(list((tmp_path / side).glob("*.safetensors")))
        assert (files > 1) == (size == "40KB")


def assert_same_model(made: Any, told: Any, ids: Tensor) -> None:
    """Compare every bit of the weights; a sum may round as its memory happens to be aligned."""
    expected = told.state_dict()
    state = made.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert relative_error(made(ids).logits, told(ids).logits) < TOLERANCE


@THERE
def test_every_head_has_the_same_tensors_on_disk(family: Family, head: str, tmp_path: Path) -> None:
    ours, theirs = family.twins(head, {"num_labels": 3}, "sdpa")
    theirs.save_pretrained(tmp_path / "theirs")
    taken = family.cls(head).from_pretrained(tmp_path / "theirs")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor), name
    taken.save_pretrained(tmp_path / "ours")
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "theirs")
    _, report = getattr(transformers, family.prefix + head).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
