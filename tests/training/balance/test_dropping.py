"""No device computes more than its share in training, texts that are exempt as always."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families.deepseek import GROUPS, model_of
from families.qwen2_moe import model_of as qwen2_moe
from families.zamba2 import model_of as zamba2
from quintet.errors import InputError
from quintet.layers.moe import Experts
from quintet.training.balance import TokenDropping
from quintet.training.balance.dropping import beyond_budget, chosen_by_content

IDS = torch.randint(1, 101, (6, 10), generator=torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**30), st.integers(0, 12))
def test_the_lowest_scores_of_a_device_go_until_it_keeps_its_budget(seed: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (6, 3), generator=generator) / 5
    devices = torch.randint(0, 3, (6, 3), generator=generator)
    spared = (torch.rand(6, 1, generator=generator) < 0.3).expand(6, 3)
    dropped = beyond_budget(scores, devices, spared, 3, budget)
    assert not (dropped & spared).any()
    for device in range(3):
        own = devices == device
        kept = own & ~dropped
        if (dropped & own).any():
            # It is full, or would be without those that are spared.
            assert int(kept.sum()) == max(budget, int((own & spared).sum()))
            may_go = kept & ~spared
            if may_go.any():
                assert scores[may_go].min() >= scores[dropped & own].max()
        else:
            assert int(own.sum()) <= budget or bool(spared[own].all())


def test_a_share_of_texts_is_exempt_by_what_they_say() -> None:
    texts = torch.arange(4000).repeat_interleave(3)
    ids = torch.randint(0, 50000, (12000,), generator=torch.Generator().manual_seed(1))
    chosen = chosen_by_content(ids, texts, 0.1)
    assert 0.08 < chosen.float().mean().item() < 0.12
    # Nothing matters but the text: not its place, not its neighbours.
    later = chosen_by_content(ids[300:600], texts[300:600], 0.1)
    assert torch.equal(later, chosen[300:600])
    assert not chosen_by_content(ids, texts, 0.0).any()
    assert chosen_by_content(ids, texts, 1.0).all()
    swapped = chosen_by_content(ids.view(-1, 3).flip(1).flatten(), texts, 0.1)
    assert not torch.equal(swapped, chosen)


def weights_of(model: torch.nn.Module, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the experts of each layer are given: the indices (N, A) and their weights."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.append(a[1:])) for m in experts]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_devices_compute_their_share_in_training_and_all_in_inference() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask}
    budget = int(mask.sum()) * 3 // 4
    model = model_of("DeepseekV2", **GROUPS).train()
    before = weights_of(model, **inputs)
    with TokenDropping(model, devices=4, exempt=0.0):
        after = weights_of(model, **inputs)
        evaluated = weights_of(model.eval(), **inputs)
        model.train()
    # Layers behind see what was left out before them; the first sees what it saw without.
    assert torch.equal(before[0][0], after[0][0])
    pairs = torch.bincount((before[0][0] // 2).flatten(), minlength=4)
    assert pairs.max() > budget
    for indices, weights in after:
        left = torch.bincount((indices // 2)[weights > 0], minlength=4)
        assert left.max() <= budget
    assert torch.equal(after[0][1], before[0][1] * (after[0][1] > 0))
    for again in (evaluated, weights_of(model, **inputs)):
        for (indices, weights), (where, by) in zip(again, before, strict=True):
            assert torch.equal(indices, where)
            assert torch.equal(weights, by)


def test_texts_that_are_exempt_are_as_without_dropping_however_they_are_packed() -> None:
    model = model_of("DeepseekV2").train()
    numbers = torch.arange(IDS.numel()).view_as(IDS) // 5 % 7
    expected = model(IDS, seq_idx=numbers, use_cache=False).logits.flatten(0, 1)
    texts = (torch.arange(6)[:, None] * 100 + numbers).flatten()
    with TokenDropping(model, devices=4, capacity=0.5, exempt=0.4):
        found = model(IDS, seq_idx=numbers, use_cache=False).logits.flatten(0, 1)
    exempt = chosen_by_content(IDS.flatten(), texts, 0.4)
    same = (found == expected).all(dim=-1)
    assert 0 < int(exempt.sum()) < len(exempt)
    assert same[exempt].all()
    assert not same[~exempt].all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_recomputed_drops_what_it_dropped_first(reentrant: bool) -> None:
    found = []
    for recomputes in (False, True):
        model = model_of("DeepseekV3", num_nextn_predict_layers=1).train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with TokenDropping(model, devices=4):
            loss = model(IDS, labels=IDS, mtp_loss_weight=0.3).loss
            # Of another forward before the backward pass.
            with torch.no_grad():
                model(IDS[:2])
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        error = (found[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
        assert error < 1e-5, name


def test_what_cannot_be_dropped_is_told_of() -> None:
    model = model_of("DeepseekV2").train()
    for options, told in (
        ({"devices": 3}, "devices=3 cannot hold 8 experts"),
        ({"capacity": 0}, "capacity=0 is a factor of a share"),
        ({"exempt": 1.5}, "exempt=1.5 is a share of all texts"),
    ):
        with pytest.raises(InputError, match=told):
            TokenDropping(model, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no experts to drop tokens of"):
        TokenDropping(zamba2())
    with TokenDropping(model), pytest.raises(InputError, match="follows from their ids"):
        model(inputs_embeds=torch.zeros(1, 2, 48))
    other = qwen2_moe().train()
    with TokenDropping(other, devices=2):
        other(IDS % 50)
        with pytest.raises(InputError, match="a layer was called by itself"):
            other.model.layers[0].mlp(torch.zeros(1, 3, 48))
