"""What a model with adapters is: in what order they came, merged, for each row, and without."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quintet
from conformance.families import FAMILIES, Family, each
from pefts import ATTENTION, IDS, QUIET, logits, lora, peft, twins
from quintet.adapters.lowrank import Remembered
from quintet.layers.snapshot import ModuleSnapshot
from support import relative_error as relative

pytestmark = QUIET
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
MoE = ("qwen2-moe", "deepseek-v2", "deepseek-v3")


def config(family: Family, shared: bool = True, **options: Any) -> quintet.LoraConfig:
    targets = [*ATTENTION[family.name], "embed_tokens"]
    # Those of a shared block are others at each of its uses, and cannot be merged.
    targets += ["down_proj"] if shared or family.name != "zamba2" else []
    if family.name in MoE:
        options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], **options}
    return quintet.LoraConfig(
        r=3, lora_alpha=12, target_modules=targets, init_lora_weights=False, **options
    )


def with_two(family: Family, *, shared: bool = True) -> Any:
    """A model with the adapters a and b, of which the latter is in use."""
    model = family.model_of(tie_word_embeddings=False)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model.add_adapter(config(family, shared, use_rslora=name == "b"), name)
    return model.eval()


def under(model: Any, *names: str) -> Tensor:
    model.set_adapter(list(names))
    return logits(model)


@each
def test_swapped_there_and_back_nothing_has_changed(family: Family) -> None:
    plain = logits(family.model_of(tie_word_embeddings=False))
    model = with_two(family)
    a = under(model, "a")
    b = under(model, "b")
    assert relative(a, b) > 1e-3
    assert torch.equal(under(model, "a"), a)
    assert torch.equal(under(model), plain)
    text = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = {}
    for name in "aba":
        model.set_adapter(name)
        text_of = model.generate(IDS, **text)
        assert torch.equal(texts.setdefault(name, text_of), text_of)


@each
def test_several_are_added_up(family: Family) -> None:
    model = with_two(family, shared=False)
    a, both = under(model, "a"), under(model, "a", "b")
    model.set_adapter(["a", "b"], [1.0, 0.0])
    weighed = logits(model)
    assert relative(weighed, a) < 1e-6
    assert relative(both, a) > 1e-3
    assert model.active_adapters() == ["a", "b"]
    merged = copy.deepcopy(model)
    merged.set_adapter(["a", "b"])
    merged.merge_adapter()
    assert relative(logits(merged), both) < 1e-5


@each
def test_merged_it_is_the_same_and_unmerged_to_the_last_bit(family: Family, tmp_path: Path) -> None:
    model = with_two(family, shared=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = logits(model)
    model.merge_adapter()
    assert not any("forward" in vars(module) for module in model.modules())
    assert relative(logits(model), made) < 1e-5
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), made)
    model.merge_and_unload()
    assert relative(logits(model), made) < 1e-5
    model.save_pretrained(tmp_path)
    again = family.cls("ForCausalLM").from_pretrained(tmp_path)
    assert relative(logits(again), made) < 1e-5


@each
def test_merging_in_bfloat16_rounds_once(family: Family) -> None:
    model = with_two(family, shared=False).to(torch.bfloat16)
    name = "mamba_decoder.mamba.in_proj" if family.name == "zamba2" else "self_attn.o_proj"
    module = model.model.layers[1].get_submodule(name)
    lora = module.adapters["b"]["all"].added["weight"].float()
    exact = module.weight.detach().float() + lora.lora_B @ lora.lora_A * lora.scale
    model.merge_adapter()
    assert torch.equal(module.weight, exact.to(torch.bfloat16))


@each
def test_layers_are_taken_down_once_while_no_adapter_is_in_use(family: Family) -> None:
    model = with_two(family, shared=False)
    model.disable_adapters()
    snapshot = ModuleSnapshot(model.model.layers)
    assert snapshot.holds()
    model.enable_adapters()
    assert not snapshot.holds()
    model.merge_adapter()
    snapshot = ModuleSnapshot(model.model.layers)
    assert snapshot.holds()
    model.unmerge_adapter()
    assert not snapshot.holds()


def test_what_several_layers_share_is_not_merged() -> None:
    model = with_two(FAMILIES[4])
    made = logits(model)
    with pytest.raises(quintet.errors.UnsupportedModelError, match="layers 1, 3"):
        model.merge_adapter()
    assert torch.equal(logits(model), made)


@each
def test_each_row_has_its_own(family: Family) -> None:
    model = with_two(family)
    names = ["a", None, "b"]
    ids = torch.cat((IDS, IDS[:1]))
    mask = torch.cat((MASK, MASK[:1]))
    with torch.no_grad():
        rows = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter([] if name is None else name)
            alone = model(input_ids=ids[row][None], attention_mask=mask[row][None]).logits
            real = mask[row].bool()
            assert relative(rows[row][real], alone[0][real]) < 1e-5
    text = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=mask, adapter_names=names, **text)
    beams = model.generate(ids[1:], adapter_names=names[1:], num_beams=3, **text)
    for row, name in enumerate(names):
        model.set_adapter([] if name is None else name)
        alone = model.generate(ids[row][None], attention_mask=mask[row][None], **text)
        assert torch.equal(alone[0], written[row])
        if row == 1:
            found = model.generate(ids[row][None], num_beams=3, **text)
            assert torch.equal(beams[0], found[0])


@each
def test_several_and_each_row_are_as_in_peft(family: Family) -> None:
    ours, theirs = twins(family)
    there = None
    for seed, name in enumerate(("one", "two")):
        config_there = lora(ATTENTION[family.name], r=2 + seed, lora_alpha=12)
        torch.manual_seed(seed)
        if there is None:
            there = peft.get_peft_model(theirs, config_there, name).eval()
        else:
            there.add_adapter(name, config_there)
        state = peft.get_peft_model_state_dict(there, adapter_name=name)
        ours.load_adapter(peft_config=config_there, adapter_state_dict=state, adapter_name=name)
    assert there is not None
    names = ["one", "__base__", "two", "two"]
    ids = torch.cat((IDS, IDS))
    with torch.no_grad():
        rows = there(input_ids=ids, adapter_names=names).logits
        assert relative(ours(input_ids=ids, adapter_names=names).logits, rows) < 1e-5
        there.base_model.set_adapter(["one", "two"])
        assert relative(under(ours, "one", "two"), there(input_ids=IDS).logits) < 1e-5


def test_another_takes_the_place_of_one(tmp_path: Path) -> None:
    model = with_two(FAMILIES[0])
    a, b = under(model, "a"), under(model, "b")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        past = model(input_ids=IDS, use_cache=True).past_key_values
    model.load_adapter(tmp_path, "a", hotswap=True)
    assert torch.equal(under(model, "a"), b)
    assert relative(a, b) > 1e-3
    with pytest.raises(quintet.errors.InputError, match="other adapters"):
        model(input_ids=IDS[:, :1], past_key_values=past)
    with pytest.raises(quintet.errors.InputError, match="no adapter 'c'"):
        model.load_adapter(tmp_path, "c", hotswap=True)
    with pytest.raises(quintet.errors.InputError, match="vocabulary"):
        model.resize_token_embeddings(128)


@each
def test_a_cache_is_of_the_adapters_it_was_made_with(family: Family) -> None:
    model = with_two(family)
    with torch.no_grad():
        past = model(input_ids=IDS, use_cache=True).past_key_values
        model(input_ids=IDS[:, :1], past_key_values=past)
        for change in (
            lambda: model.set_adapter("a"),
            lambda: model.set_adapter(["a", "b"]),
            model.disable_adapters,
        ):
            change()
            with pytest.raises(quintet.errors.InputError, match="other adapters"):
                model(input_ids=IDS[:, :1], past_key_values=past)
        model.enable_adapters()
        model.set_adapter("b")
        model(input_ids=IDS[:, :1], past_key_values=past)
        with pytest.raises(quintet.errors.InputError, match="other adapters"):
            model(input_ids=IDS[:, :1], past_key_values=past, adapter_names=["a", "b"])
        own = model(input_ids=IDS, use_cache=True, adapter_names=["a", "b"]).past_key_values
        own.reorder_cache(torch.tensor([1, 0]))
        model(input_ids=IDS[:, :1], past_key_values=own, adapter_names=["b", "a"])
        with pytest.raises(quintet.errors.InputError, match="other adapters"):
            model(input_ids=IDS[:, :1], past_key_values=own, adapter_names=["a", "b"])


@each
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_adapters_of_its_own(family: Family, copying: Callable[[Any], Any]) -> None:
    model = with_two(family)
    made = logits(model)
    other = copying(model)
    assert torch.equal(logits(other), made)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".adapters.b." in name:
                parameter.zero_()
    other.set_adapter("b")
    assert relative(logits(other), made) > 1e-3
    assert torch.equal(logits(model), made)


@each
@pytest.mark.parametrize("rows", [1, 30])
def test_maps_run_once_whatever_adapters_rows_have(family: Family, rows: int) -> None:
    """Beside each other for few tokens, one by one for many."""
    model = family.model_of(tie_word_embeddings=False)
    path = f"{'mamba.in' if family.name == 'zamba2' else 'self_attn.o'}_proj"
    map_ = next(module for name, module in model.named_modules() if name.endswith(path))
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return type(map_).forward(map_, x)

    object.__setattr__(map_, "forward", counted)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        dora = {"use_dora": True, "target_parameters": None} if rows > 1 and name == "c" else {}
        model.add_adapter(config(family, rank_pattern={path: 2 + seed}, **dora), name)
    model.eval()
    names = ["c", None, "a", "b", "c", "a"]
    ids = torch.arange(5, 35).view(6, 5).repeat(rows, 1)
    with torch.no_grad():
        made = model(input_ids=ids, adapter_names=names * rows).logits
        assert len(calls) == 1
        for name in (None, "a", "b", "c"):
            model.set_adapter([] if name is None else name)
            own = [row for row, one in enumerate(names) if one == name]
            assert relative(made[own], model(input_ids=ids[own]).logits) < 1e-5


def test_what_is_remembered_is_of_tensors_and_not_of_where_they_lie() -> None:
    remembered: Remembered[float] = Remembered()
    numbers = np.zeros(1)
    for value in (1.0, 2.0):
        # The second lies where the first lay, and neither was ever changed.
        numbers[:] = value
        tensor = torch.from_numpy(numbers)
        assert remembered.get([tensor], tensor.item) == value
        assert remembered.get([tensor], lambda: -1.0) == value
        del tensor
