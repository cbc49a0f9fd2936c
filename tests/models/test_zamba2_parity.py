"""Zamba2 computes what Transformers computes, where that is right (docs/compatibility.md).

Tolerances: docs/numerics.md. Transformers' side is its PyTorch path; what is asserted is the
promise, 1e-5 relative in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.zamba2_support import SHAPES, twins
from quintet.models.zamba2 import Zamba2ForCausalLM, Zamba2ForTokenClassification, Zamba2Model
from support import relative_error

TOLERANCE = 1e-5
B, T, V = 3, 21, 101
CASES = [pytest.param(changes, id=name) for name, changes in SHAPES.items()]
# Transformers lets the bias of in_proj at padding into the state; test_zamba2_forward.py has ours.
GRID = [
    pytest.param(case.values[0], padding, id=f"{case.id}-{padding}")
    for case in CASES
    for padding in ("none", "left", "right")
    if not (case.id == "bias" and padding == "left")
]


def batch(padding: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, V, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    if padding == "left":
        mask[1, :7], mask[2, :2] = 0, 0
    if padding == "right":
        mask[1, -7:], mask[2, -2:] = 0, 0
    return ids, mask


def counted_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of tokens that a token precedes: a prediction made from padding means nothing."""
    labels = ids.masked_fill(mask == 0, -100)
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return labels.masked_fill(before == 0, -100)


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    other = dict(theirs.named_parameters())
    made = dict(ours.named_parameters())
    assert made.keys() == other.keys()
    scales: dict[str, float] = {}
    for name, parameter in other.items():
        assert parameter.grad is not None, name
        part = name.rsplit(".", 2)[0]
        scales[part] = max(scales.get(part, 0.0), float(parameter.grad.abs().max()))
    for name, parameter in made.items():
        expected = other[name].grad
        assert parameter.grad is not None, name
        assert expected is not None
        error = float((parameter.grad - expected).abs().max())
        assert error < TOLERANCE * scales[name.rsplit(".", 2)[0]], name


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("changes", "padding"), GRID)
def test_forward_and_gradients_equal_transformers(
    changes: dict[str, Any], padding: str, backend: str
) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", changes, backend)
    ids, mask = batch(padding)
    inputs = {"attention_mask": mask, "labels": counted_labels(ids, mask), "use_cache": False}
    kept = mask.bool()

    told = theirs(ids, output_hidden_states=True, **inputs)
    made = ours(ids, output_hidden_states=True, **inputs)
    told.loss.backward()
    made.loss.backward()

    assert relative_error(made.logits[kept], told.logits[kept]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert len(made.hidden_states) == len(told.hidden_states)
    for mine, other in zip(made.hidden_states, told.hidden_states, strict=True):
        assert relative_error(mine[kept], other[kept]) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_are_those_of_the_hybrid_layers(padding: str, use_cache: bool) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", SHAPES["7b"])
    ids, mask = batch(padding)
    inputs = {"attention_mask": mask, "output_attentions": True, "use_cache": use_cache}
    told, made = theirs(ids, **inputs).attentions, ours(ids, **inputs).attentions
    kept = mask.bool()
    assert len(made) == len(told) == 4
    for mine, other in zip(made, told, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_prefill_and_steps_equal_transformers(changes: dict[str, Any]) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", changes)
    ids, _ = batch("none")
    mine = other = None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 16), (16, 17), (17, 21)):
        part = ids[:, start:stop]
        told = theirs(part, past_key_values=other, use_cache=True)
        made = ours(part, past_key_values=mine, use_cache=True)
        mine, other = made.past_key_values, told.past_key_values
        assert relative_error(made.logits, told.logits) < TOLERANCE, start


@pytest.mark.parametrize("changes", [CASES[5], CASES[6]])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_text_equals_transformers(changes: dict[str, Any], kind: str, padded: bool) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", changes)
    ids, mask = batch("left" if padded else "none")
    length = {"max_new_tokens": 64, "do_sample": False}
    told = theirs.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **length)
    ours.generation_config = ours.generation_config.replace(eos_token_id=[])
    chosen = {} if kind == "dynamic" else {"cache_implementation": "static"}
    assert torch.equal(ours.generate(ids, attention_mask=mask, **length, **chosen), told)


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_bfloat16_stays_within_its_rounding(changes: dict[str, Any]) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", changes, "eager")
    ids, mask = batch("none")
    exact = theirs(ids, attention_mask=mask).logits
    told = theirs.bfloat16()(ids, attention_mask=mask).logits.float()
    made = ours.bfloat16()(ids, attention_mask=mask).logits.float()
    # Both round at every operation; ours may be no farther from the truth than theirs is.
    assert relative_error(made, exact) < 1.5 * relative_error(told, exact) + 2**-8


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("labels", "count"),
    [
        pytest.param(torch.tensor([3, 0, 1]), 4, id="single"),
        pytest.param(torch.tensor([0.5, -1.0, 2.0]), 1, id="regression"),
        pytest.param(torch.eye(4)[:3], 4, id="multi"),
    ],
)
def test_sequence_classification_equals_transformers(
    labels: Tensor, count: int, padding: str
) -> None:
    ours, theirs = twins("Zamba2ForSequenceClassification", {"num_labels": count})
    ids, mask = batch(padding)
    ids = ids.masked_fill(mask == 0, 0)
    told = theirs(ids, attention_mask=mask, labels=labels, use_cache=False)
    made = ours(ids, attention_mask=mask, labels=labels, use_cache=False)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits, told.logits) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


def test_model_without_head_equals_transformers() -> None:
    ours, theirs = twins("Zamba2Model", {})
    ids, mask = batch("none")
    told, made = theirs(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    assert relative_error(made.last_hidden_state, told.last_hidden_state) < TOLERANCE


# -- checkpoints --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_checkpoints_go_both_ways(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", changes)
    ids, _ = batch("none")
    theirs.save_pretrained(tmp_path / "theirs")
    taken = Zamba2ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(taken(ids).logits, ours(ids).logits)

    ours.save_pretrained(tmp_path / "ours")
    back, report = transformers.Zamba2ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    files = [load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()


@torch.no_grad()
@pytest.mark.parametrize("names", ["all", "last"])
def test_a_shared_block_is_found_under_any_of_its_names(names: str, tmp_path: Path) -> None:
    ours, theirs = twins("Zamba2ForCausalLM", SHAPES["7b"])
    theirs.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    if names == "last":
        for first, again in ((0, 3), (2, 5)):
            for name in [name for name in state if f"layers.{first}.shared_transformer" in name]:
                assert name.replace(f"layers.{first}.", f"layers.{again}.") in state
                del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids, _ = batch("none")
    assert torch.equal(Zamba2ForCausalLM.from_pretrained(tmp_path)(ids).logits, ours(ids).logits)
    bare = Zamba2Model.from_pretrained(tmp_path)
    assert torch.equal(bare(ids).last_hidden_state, ours.model(ids).last_hidden_state)


def test_a_new_head_goes_on_a_released_model(tmp_path: Path) -> None:
    ours, _ = twins("Zamba2ForCausalLM", {})
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        model = Zamba2ForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 3)
