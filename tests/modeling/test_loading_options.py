"""What `from_pretrained` is told: other weights, other names, other shapes, a report."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quintet
from conformance.families import Family, each
from families import qwen2_moe, zamba2
from quintet.errors import CheckpointError, InputError, UnsupportedBackendError
from quintet.modeling.loading import NewHeadWarning, UnusedTensorWarning
from support import small_config

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def made(**changes: Any) -> Any:
    return quintet.Qwen2ForCausalLM(small_config(num_hidden_layers=1, **changes)).eval()


def rewrite(root: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a one-file checkpoint; None takes them out. Dots are written `__`."""
    weights = load_file(root / "model.safetensors")
    for key, tensor in changes.items():
        weights.pop(key.replace("__", "."), None)
        if tensor is not None:
            weights[key.replace("__", ".")] = tensor
    save_file(weights, root / "model.safetensors", {"format": "pt"})


def assert_same(ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key in mine:
        assert torch.equal(mine[key], other[key]), key


# -- other weights -----------------------------------------------------------------------------


def test_a_state_dict_in_place_of_the_files(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    again = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, state_dict=doubled)
    assert all(torch.equal(t, doubled[n]) for n, t in again.state_dict().items())
    next(again.parameters()).data.zero_()
    assert doubled["model.embed_tokens.weight"].any(), "memory is not shared"
    bare = quintet.Qwen2ForCausalLM.from_pretrained(None, config=model.config, state_dict=doubled)
    assert bare.model.norm.weight[0] == 2
    (tmp_path / "model.safetensors").unlink()
    quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, state_dict=doubled)


def test_a_state_dict_is_complete_or_refused(tmp_path: Path) -> None:
    model = made()
    state = model.state_dict()
    state.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"state_dict does not fit(.|\n)*model\.norm\.weight"):
        quintet.Qwen2ForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    with pytest.raises(InputError, match="needs config and state_dict"):
        quintet.Qwen2ForCausalLM.from_pretrained(None, state_dict=state)
    with pytest.raises(InputError, match="needs config and state_dict"):
        quintet.Qwen2ForCausalLM.from_pretrained(None, config=model.config)
    wrong: Any = {"x": [1]}
    with pytest.raises(InputError, match="'x' is a list"):
        quintet.Qwen2ForCausalLM.from_pretrained(None, config=model.config, state_dict=wrong)


def test_experts_one_by_one_in_a_state_dict_are_stacked() -> None:
    ours, theirs = qwen2_moe.twins("Qwen2MoeForCausalLM", {})
    again = quintet.Qwen2MoeForCausalLM.from_pretrained(
        None, config=ours.config, state_dict=theirs.state_dict()
    )
    assert_same(again, ours)


@pytest.mark.parametrize(
    "name",
    ["variant", "state_dict", "key_mapping", "quantize", "gguf_file", "device_mesh"],
)
def test_an_option_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    for wrong in (5, 1.5, [5], True, {"a": 1} if name != "key_mapping" else {5}):
        options: dict[str, Any] = {name: wrong}
        with pytest.raises(InputError, match=name):
            quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, **options)


def test_a_device_beyond_all_numbers_is_none_of_this_machine(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackendError, match="is not a device of this machine"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, device_map=10**30)


@pytest.mark.parametrize("wrong", [3, [1], "x", {"a": 1}, {"model.norm.weight": [1.0]}])
def test_what_is_no_state_dict_is_not_saved(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="state_dict"):
        made().save_pretrained(tmp_path / "new", state_dict=wrong)
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_variant_of_the_weights(tmp_path: Path) -> None:
    first, second = made(), made()
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path / "other", max_shard_size="30KB")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"see `variant`(.|\n)*model\.fp16\.safetensors"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert_same(quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, variant="fp16"), first)
    with pytest.raises(InputError, match="has to be a word such as 'fp16'"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, variant="../x")


# -- other names -------------------------------------------------------------------------------


def test_names_are_mapped_in_order_as_transformers_does(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    weights = {
        name.replace("model.", "decoder.blocks.").replace("mlp", "ffn"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    mapping = {r"^decoder\.": "", r"^blocks\.": "model.", r"\.ffn\.": ".mlp."}
    ours = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, key_mapping=mapping)
    assert_same(ours, model)


def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\{'\(': 'x'\} is not a regular expression"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, key_mapping={"(": "x"})
    with pytest.raises(CheckpointError, match="the one name 'same'"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, key_mapping={".+": "same"})


# -- other shapes, and a report ----------------------------------------------------------------


def test_the_report_of_a_complete_model_is_empty(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model, report = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    _, theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, quintet.Qwen2ForCausalLM)
    assert not any(report.values())
    assert report.keys() <= theirs.keys()


def test_the_report_says_what_transformers_says(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    rewrite(tmp_path, model__layers__7__odd=torch.ones(2))
    head: Any = {"num_labels": 3, "output_loading_info": True}
    with pytest.warns(NewHeadWarning), pytest.warns(UnusedTensorWarning):
        _, ours = quintet.Qwen2ForSequenceClassification.from_pretrained(tmp_path, **head)
    _, theirs = transformers.Qwen2ForSequenceClassification.from_pretrained(tmp_path, **head)
    assert ours["missing_keys"] == set(theirs["missing_keys"]) == {"score.weight"}
    # There, the head of another class counts as unexpected.
    assert ours["unexpected_keys"] == set(theirs["unexpected_keys"]) - {"lm_head.weight"}
    assert ours["unexpected_keys"] == {"model.layers.7.odd"}


def test_layers_that_predict_further_tokens_are_no_loss_to_another_head() -> None:
    head: Any = {"num_labels": 2, "output_loading_info": True}
    with pytest.warns(NewHeadWarning) as told:
        _, report = quintet.DeepseekV3ForSequenceClassification.from_pretrained(
            quintet.demo_model(), **head
        )
    assert [warning.category for warning in told] == [NewHeadWarning]
    assert any(name.startswith("model.layers.5.") for name in report["unexpected_keys"])


def test_tensors_of_another_shape_start_fresh_if_told_so(tmp_path: Path) -> None:
    model = made(initializer_range=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected \[90, 64\], found \[101, 64\]"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, vocab_size=90)
    options: Any = {"vocab_size": 90, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with pytest.warns(NewHeadWarning, match="other shapes(.|\n)*have to be trained"):
        ours, report = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, **options)
    config = transformers.AutoConfig.from_pretrained(tmp_path, vocab_size=90)
    del options["vocab_size"]
    _, theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, config=config, **options)
    assert report["mismatched_keys"] == {
        (name, tuple(found), tuple(expected)) for name, found, expected in theirs["mismatched_keys"]
    }
    assert len(report["mismatched_keys"]) == 2
    assert 0.3 < float(ours.lm_head.weight.detach().std()) < 0.7
    assert_same(ours.model.layers, model.model.layers)


def test_missing_tensors_are_an_error_all_the_same(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    rewrite(tmp_path, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"1 missing:\n  model\.norm\.weight"):
        quintet.Qwen2ForCausalLM.from_pretrained(
            tmp_path, vocab_size=90, ignore_mismatched_sizes=True
        )


def test_experts_of_another_shape_start_fresh_whole(tmp_path: Path) -> None:
    ours, _ = qwen2_moe.twins("Qwen2MoeForCausalLM", {})
    ours.save_pretrained(tmp_path)
    wider = 2 * ours.config.moe_intermediate_size
    with pytest.warns(NewHeadWarning, match=r"experts\.gate_up_proj"):
        again = quintet.Qwen2MoeForCausalLM.from_pretrained(
            tmp_path, moe_intermediate_size=wider, ignore_mismatched_sizes=True
        )
    assert torch.isfinite(again(IDS).logits).all()
    assert torch.equal(again.model.embed_tokens.weight, ours.model.embed_tokens.weight)


# -- one tensor under two names ----------------------------------------------------------------


def test_a_tied_head_that_differs_is_refused_by_both_names(tmp_path: Path) -> None:
    model = made(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    table = model.lm_head.weight.detach()
    rewrite(tmp_path, lm_head__weight=table.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(quintet.Qwen2ForCausalLM.from_pretrained(tmp_path), model)
    rewrite(tmp_path, lm_head__weight=table + 1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        quintet.Qwen2ForCausalLM.from_pretrained(tmp_path)
    untied = quintet.Qwen2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(untied.lm_head.weight, table + 1)


@torch.no_grad()
def test_shared_blocks_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    ours, tied = zamba2.twins("Zamba2ForCausalLM", zamba2.SHAPES["7b"])
    tied.config.tie_word_embeddings = False
    transformers.Zamba2ForCausalLM(tied.config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="one tensor of the model, and there with different"):
        quintet.Zamba2ForCausalLM.from_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    blocks = ours.config.num_mem_blocks
    hybrids = ours.config.hybrid_layer_ids
    for use in range(blocks, len(hybrids)):
        first, again = f"layers.{hybrids[use % blocks]}.", f"layers.{hybrids[use]}."
        for name in [n for n in weights if f"{first}shared_transformer" in n]:
            weights[name.replace(first, again)] = weights[name].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    quintet.Zamba2ForCausalLM.from_pretrained(tmp_path)
    name = f"model.layers.{hybrids[blocks]}.shared_transformer.self_attn.o_proj.weight"
    rewrite(tmp_path, **{name.replace(".", "__"): weights[name] + 1})
    with pytest.raises(CheckpointError, match=rf"{name} and model\.layers\.{hybrids[0]}\."):
        quintet.Zamba2ForCausalLM.from_pretrained(tmp_path)


# -- arguments of Transformers -------------------------------------------------------------------


@each()
def test_the_names_of_arguments_are_those_of_transformers(family: Family, tmp_path: Path) -> None:
    model = family.model_of("ForCausalLM")
    model.save_pretrained(tmp_path)
    for cls in (type(model), quintet.AutoModelForCausalLM):
        assert_same(cls.from_pretrained(pretrained_model_name_or_path=tmp_path), model)
    for found in (type(model.config), quintet.AutoConfig):
        config = found.from_pretrained(pretrained_model_name_or_path=tmp_path)
        assert config.to_dict() == model.config.to_dict()
    # What asks for nothing may be asked for.
    idle: dict[str, Any] = {
        "force_download": False, "weights_only": True, "from_tf": False, "from_flax": False,
        "proxies": None, "use_safetensors": None, "load_in_8bit": False, "tp_plan": None,
        "offload_folder": None, "use_kernels": False, "config": None, "state_dict": None,
        "generation_config": None, "attn_implementation": None,
    }  # fmt: skip
    assert_same(type(model).from_pretrained(tmp_path, **idle), model)
    for name, value in {"force_download": True, "from_tf": True, "proxies": {"http": "x"}}.items():
        with pytest.raises(InputError, match=f"{name}: .* is not in this version"):
            type(model).from_pretrained(tmp_path, **{name: value})


@each()
def test_a_config_goes_with_an_attention_and_may_be_a_place(family: Family, tmp_path: Path) -> None:
    model = family.model_of("ForCausalLM")
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    config = type(model.config).from_pretrained(tmp_path / "model")
    for cls in (type(model), quintet.AutoModelForCausalLM):
        for given in (config, str(tmp_path / "config"), tmp_path / "config"):
            eager = cls.from_pretrained(
                tmp_path / "model", config=given, attn_implementation="eager"
            )
            assert eager.config.attn_implementation == "eager"
            assert_same(eager, model)
    assert config.attn_implementation != "eager"
    with pytest.raises(InputError, match="vocab_size: give either a config or keys"):
        type(model).from_pretrained(tmp_path / "model", config=config, vocab_size=7)


def test_a_generation_config_in_place_of_the_checkpoints(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    wanted = quintet.GenerationConfig(max_new_tokens=7)
    model = quintet.AutoModelForCausalLM.from_pretrained(tmp_path, generation_config=wanted)
    assert model.generation_config.max_new_tokens == 7
    with pytest.raises(InputError, match="a Qwen2Model generates nothing"):
        quintet.Qwen2Model.from_pretrained(tmp_path, generation_config=wanted)
