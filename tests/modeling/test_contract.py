"""The names by which tools know a model."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import quintet
from conformance.families import FAMILIES, Family, each, each_head
from quintet.errors import InputError


def twins(family: Family, head: str = "ForCausalLM", **changes: Any) -> tuple[Any, Any]:
    return family.twins(head, changes, "sdpa")


SHARED = [
    pytest.param(family, head, id=f"{family.name}-{head}")
    for family in FAMILIES
    for head in family.heads_there
]


@pytest.mark.parametrize(("family", "head"), SHARED)
def test_counts_are_those_of_transformers(family: Family, head: str) -> None:
    ours, theirs = twins(family, head)
    for model in (ours, theirs):
        model.get_input_embeddings().weight.requires_grad_(False)
    for trainable in (False, True):
        for without in (False, True):
            assert ours.num_parameters(trainable, without) == theirs.num_parameters(
                only_trainable=trainable, exclude_embeddings=without
            )
    assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(False)


@each
def test_the_weights_of_a_quantised_model_are_counted(family: Family, tmp_path: Any) -> None:
    model = family.model_of()
    model.save_pretrained(tmp_path)
    held = family.cls("ForCausalLM").from_pretrained(tmp_path, quantize="int8")
    for without in (False, True):
        assert held.num_parameters(False, without) == model.num_parameters(False, without)
    assert held.get_memory_footprint() < model.get_memory_footprint()
    assert held.num_parameters(only_trainable=True) == 0


@each_head
def test_what_can_generate_says_so_by_its_class(family: Family, head: str) -> None:
    cls = family.cls(head)
    assert cls.can_generate() is (head == "ForCausalLM")
    model = family.model_of(head)
    assert model.can_generate() is cls.can_generate()
    assert model.get_decoder() is model.base_model
    assert model.main_input_name == "input_ids"
    assert model(**model.dummy_inputs) is not None


@each
def test_a_decoder_is_replaced(family: Family) -> None:
    model, other = family.model_of(), family.model_of("Model", initializer_range=0.5)
    model.set_decoder(other)
    assert model.get_decoder() is other
    assert (model.lm_head.weight is other.embed_tokens.weight) is model.config.tie_word_embeddings
    with pytest.raises(quintet.errors.InputError, match="is a decoder itself"):
        other.set_decoder(model.base_model)


@each
def test_an_output_layer_is_replaced_and_saved(family: Family, tmp_path: Any) -> None:
    model = family.model_of(tie_word_embeddings=True)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    ids = torch.arange(4)[None]
    model.save_pretrained(tmp_path)
    again = family.cls("ForCausalLM").from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(quintet.errors.InputError, match="no output embeddings"):
        family.model_of("Model").set_output_embeddings(head)


@each
def test_names_of_a_model_that_was_read(family: Family, tmp_path: Any) -> None:
    model = family.model_of(tie_word_embeddings=True)
    assert model.name_or_path == ""
    model.save_pretrained(tmp_path)
    again = family.cls("ForCausalLM").from_pretrained(tmp_path)
    assert again.name_or_path == str(tmp_path)
    assert "lm_head.weight" in again._keys_to_ignore_on_save
    assert all(type(layer).__name__ in again._no_split_modules for layer in again.model.layers)


def test_tags_are_kept_once() -> None:
    model = FAMILIES[0].model_of()
    assert model.model_tags is None
    model.add_model_tags("sft")
    model.add_model_tags(["sft", "trl"])
    assert model.model_tags == ["sft", "trl"]
    assert FAMILIES[0].model_of().model_tags is None


@each
@torch.no_grad()
def test_a_loop_of_ones_own_makes_what_generate_makes(family: Family) -> None:
    model = family.model_of()
    ids = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=4)
    past = None
    for _ in range(4):
        made = model(
            **model.prepare_inputs_for_generation(
                ids, past_key_values=past, attention_mask=mask, use_cache=True
            )
        )
        past = made.past_key_values
        ids = torch.cat((ids, made.logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
    assert torch.equal(ids, wanted)


@each
def test_one_process_alone_saves(family: Family, tmp_path: Any) -> None:
    model = family.model_of()
    model.save_pretrained(tmp_path / "other", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "main", True, save_function=torch.save)
    ids = torch.arange(4)[None]
    again = family.cls("ForCausalLM").from_pretrained(tmp_path / "main")
    assert torch.equal(again(ids).logits, model(ids).logits)


@each()
def test_tied_weights_that_became_two_are_not_saved_as_one(family: Family, tmp_path: Any) -> None:
    model = family.model_of("ForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    before = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(before.detach().clone())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(InputError, match=r"lm_head.weight differs from .*tie_word_embeddings"):
        model.save_pretrained(tmp_path)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, before)


def test_the_devices_of_a_spread_model_are_told(tmp_path: Any) -> None:
    family = FAMILIES[0]
    family.model_of("ForCausalLM").save_pretrained(tmp_path)
    plain = quintet.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert not hasattr(plain, "hf_device_map")
    spread = {"": "cpu", "lm_head": "cpu:0"}
    model = quintet.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread)
    assert model.hf_device_map == {path: torch.device(name) for path, name in spread.items()}


@each_head
def test_forward_names_its_options_and_refuses_others(family: Family, head: str) -> None:
    model = family.model_of(head)
    names = inspect.signature(model.forward).parameters
    assert {"cu_seq_lens_q", "max_length_k", "seq_idx"} <= set(names)
    assert not {"packing", "options", "shift_labels"} & set(names)
    with pytest.raises(TypeError, match=r"forward\(\) got .* argument 'seq_lens'"):
        model(torch.tensor([[1, 2]]), seq_lens=[1, 1])
