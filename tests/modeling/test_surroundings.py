"""What is around a model stays as it is, and does not change what is loaded."""

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import HEADS, Family, each
from quintet.errors import InputError, QuintetError, UnsupportedBackendError


def saved(family: Family, root: Path, **changes: Any) -> Path:
    family.model_of(**changes).save_pretrained(root)
    return root


def ids() -> torch.Tensor:
    return torch.arange(1, 9)[None]


# -- a config is the caller's --------------------------------------------------------------------


@each
def test_a_config_that_is_given_stays_as_it_is(family: Family, tmp_path: Path) -> None:
    root = saved(family, tmp_path)
    cls = family.cls("ForCausalLM")
    config = cls.config_class.from_pretrained(root)
    before = copy.deepcopy(vars(config))
    for model in (
        cls.from_pretrained(root, config=config, quantize="int8"),
        cls.from_pretrained(root, config=config, dtype=torch.bfloat16),
        cls.from_config(config, dtype="bfloat16"),
        cls.from_config(config, attn_implementation="eager"),
        cls(config),
    ):
        model.set_attn_implementation("eager")
        model.config.use_cache = False
        if model.config.to_dict().get("quantization_config") is None:
            model.resize_token_embeddings(model.config.vocab_size + 3)
        model.save_pretrained(tmp_path / "again")
        assert vars(config) == before
    again = cls.from_pretrained(root, config=config)
    assert "quantization_config" not in vars(again.config)
    assert again.dtype == torch.float32


@each
def test_head_and_model_have_one_config(family: Family) -> None:
    for head in HEADS[1:]:
        model = family.model_of(head)
        assert model.base_model.config is model.config
        twin = copy.deepcopy(model)
        assert twin.base_model.config is twin.config is not model.config
        twin.resize_token_embeddings(150)
        assert model.config.vocab_size != 150


@each
def test_to_dict_is_the_same_after_a_save(family: Family, tmp_path: Path) -> None:
    config = family.config()
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.name_or_path == str(tmp_path)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("multiple", [1.3, 0, True, "8"])
def test_a_vocabulary_has_a_whole_size(multiple: Any) -> None:
    from conformance.families import FAMILIES

    model = FAMILIES[0].model_of()
    with pytest.raises(InputError, match="pad_to_multiple_of"):
        model.resize_token_embeddings(120, pad_to_multiple_of=multiple)
    with pytest.raises(InputError, match="new_num_tokens"):
        model.resize_token_embeddings(120.5)


# -- contexts ------------------------------------------------------------------------------------


@each
def test_no_model_comes_without_weights(family: Family, tmp_path: Path) -> None:
    from accelerate import init_empty_weights

    root = saved(family, tmp_path)
    cls = family.cls("ForCausalLM")
    with pytest.raises(UnsupportedBackendError, match="meta"), torch.device("meta"):
        cls.from_pretrained(root)
    with pytest.raises(QuintetError, match="meta"), init_empty_weights():
        cls.from_pretrained(root)
    with torch.device("meta"):
        there = cls.from_pretrained(root, device_map="cpu")
    assert torch.equal(there(ids()).logits, family.model_of()(ids()).logits)


@each
def test_a_model_that_is_loaded_in_inference_mode_can_be_trained(
    family: Family, tmp_path: Path
) -> None:
    root = saved(family, tmp_path)
    cls = family.cls("ForCausalLM")
    expected = cls.from_pretrained(root)
    contexts: list[AbstractContextManager[Any]] = [torch.inference_mode(), torch.no_grad()]
    for context in contexts:
        with context:
            model = cls.from_pretrained(root)
        assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
        model.train()(ids(), labels=ids()).loss.backward()
        assert all(p.requires_grad for p in expected.parameters()) == all(
            p.requires_grad for p in model.parameters()
        )


@each
def test_the_default_dtype_does_not_change_what_is_loaded(family: Family, tmp_path: Path) -> None:
    root = saved(family, tmp_path)
    cls = family.cls("ForCausalLM")
    expected = cls.from_pretrained(root)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            model = cls.from_pretrained(root)
        finally:
            torch.set_default_dtype(torch.float32)
        for (name, ours), (_, theirs) in zip(
            [*model.named_parameters(), *model.named_buffers()],
            [*expected.named_parameters(), *expected.named_buffers()],
            strict=True,
        ):
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name


# -- state dicts of released names ---------------------------------------------------------------


def released(family: Family, root: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(saved(family, root) / "model.safetensors")


@each
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_of_released_names_loads(
    family: Family, tmp_path: Path, strict: bool, wrapped: bool
) -> None:
    state = released(family, tmp_path)
    model = family.cls("ForCausalLM")(family.config(**family.alone))
    state |= {second: state[first] for second, first in model.tied_names().items()}
    target = torch.nn.Sequential(model) if wrapped else model
    if wrapped:
        state = {f"0.{name}": tensor for name, tensor in state.items()}
    names = list(target.state_dict())
    target.load_state_dict(state, strict=strict)
    assert list(target.state_dict()) == names
    assert torch.equal(model.eval()(ids()).logits, family.model_of()(ids()).logits)


@each
def test_half_a_stack_of_experts_is_an_error(family: Family, tmp_path: Path) -> None:
    if not family.routes(family.config()):
        return
    state = released(family, tmp_path)
    model = family.model_of()
    lost = next(name for name in state if ".experts.1.up_proj" in name)
    shrunk = {name: t[:-1] if name == lost else t for name, t in state.items()}
    del state[lost]
    for wrong in (state, shrunk):
        with pytest.raises(RuntimeError, match=lost.replace(".", r"\.")):
            model.load_state_dict(wrong, strict=False)
