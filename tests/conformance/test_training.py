"""Weights and how they are trained: fresh, tied and resized ones, gradients, dropout."""

from pathlib import Path

import pytest
import torch

from comparisons import TOLERANCE
from conformance.families import HEADS, Family, each, each_head
from conformance.heads import B, T, ids_of, labels_of, made, objective, result
from support import relative_error

# -- weights ---------------------------------------------------------------------------------


@each_head
def test_fresh_weights_have_the_initial_spread(family: Family, head: str) -> None:
    variant = family.variants[family.thorough[0]]
    model = family.cls(head)(family.config(**variant, num_labels=3, initializer_range=0.05))
    seen = 0
    for name, parameter in model.named_parameters():
        # A convolution is drawn by its own size.
        if parameter.ndim > 1 and "conv1d" not in name:
            spread = 5 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.05, rel=spread), name
            seen += 1
        elif name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith(("proj.bias", "score.bias", "qa_outputs.bias")):
            assert not parameter.any(), name
    assert seen > 10


@torch.no_grad()
@each_head
def test_the_vocabulary_can_be_resized(family: Family, head: str) -> None:
    model = made(family, head)
    ids = ids_of()
    before = result(model(ids))
    assert model.resize_token_embeddings(110) is model.get_input_embeddings()
    after = result(model(ids))
    assert relative_error(after[..., : before.shape[-1]], before) < TOLERANCE
    if head == "ForCausalLM":
        assert after.shape[-1] == 110
    mean = model.get_input_embeddings().weight[:109].mean(dim=0).expand(B, T, -1)
    new = result(model(torch.full((B, T), 109)))
    assert relative_error(new, result(model(inputs_embeds=mean))) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@each
def test_tied_weights_are_one_and_stay_one(family: Family, tied: bool, tmp_path: Path) -> None:
    model = made(family, "ForCausalLM", tie_word_embeddings=tied)
    model.resize_token_embeddings(110)
    model.double()
    model.save_pretrained(tmp_path)
    loaded = family.cls("ForCausalLM").from_pretrained(tmp_path)
    for same in (model, loaded):
        assert (same.lm_head.weight is same.model.embed_tokens.weight) == tied
        own = 0 if tied else same.lm_head.weight.numel()
        assert same.num_parameters() == same.model.num_parameters() + own


# -- training --------------------------------------------------------------------------------


@each_head
def test_gradient_checkpointing_gives_the_same_gradients(family: Family, head: str) -> None:
    ids, labels = ids_of(), labels_of(head)
    grads, runs = [], []
    for frugal in (False, True):
        model = made(family, head, classifier_dropout=0.0).train()
        if frugal:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == frugal
        calls: list[int] = []
        model.base_model.layers[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        objective(model, head, ids, labels).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        runs.append(len(calls))
    assert runs == [1, 2]
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert torch.allclose(grads[1][name], grad, rtol=1e-5, atol=1e-7), name


@torch.no_grad()
@each_head
def test_attention_dropout_acts_in_training_alone(
    family: Family, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of()
    for way in family.ways:
        backend = family.backend(way, monkeypatch)
        changes = {"attn_implementation": backend, "classifier_dropout": 0.0}
        model = made(family, head, **changes, attention_dropout=0.5)
        assert torch.equal(result(model(ids)), result(model(ids)))
        model.train()
        assert not torch.equal(result(model(ids)), result(model(ids)))
        without = made(family, head, **changes)
        still = result(without(ids))
        assert torch.equal(result(without.train()(ids)), still)


@pytest.mark.parametrize("head", HEADS[1:])
@each
def test_a_head_learns_a_batch_by_heart(family: Family, head: str) -> None:
    model = made(family, head, attention_dropout=0.1, classifier_dropout=0.0).train()
    ids = torch.arange(1, 1 + B * T).reshape(B, T)
    labels = {"labels": ids} if head == "ForCausalLM" else labels_of(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(90):
        optimizer.zero_grad()
        loss = model(ids, **labels).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    assert loss.item() < 0.1
    if head == "ForCausalLM":
        text = model.eval().generate(ids[:, :4], max_new_tokens=T - 4, eos_token_id=[])
        assert text.tolist() == ids.tolist()
