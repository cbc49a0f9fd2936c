"""What every model can do besides running: resizing, precision, checkpointing, backends."""

import copy
from typing import Any

import pytest
import torch

from quintet import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel
from quintet.configuration import PreTrainedConfig
from quintet.errors import InputError, UnsupportedBackendError
from quintet.ops.rope import inverse_frequencies
from support import SMALL, relative_error, small_config

tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 9, 4, 3, 2]])


def made(**changes: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(small_config(**changes)).eval()


# -- the vocabulary's size -------------------------------------------------------------------


@tied_or_not
@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        pytest.param({"new_num_tokens": 90}, 90, id="smaller"),
        pytest.param({"new_num_tokens": 130}, 130, id="larger"),
        pytest.param({"new_num_tokens": 101}, 101, id="same"),
        pytest.param({}, 101, id="nothing"),
        pytest.param({"pad_to_multiple_of": 64}, 128, id="pad"),
        pytest.param({"new_num_tokens": 129, "pad_to_multiple_of": 64}, 192, id="both"),
        pytest.param({"new_num_tokens": 128, "pad_to_multiple_of": 64}, 128, id="no-need"),
    ],
)
def test_resizing_keeps_the_rows_there_were(tied: bool, arguments: Any, size: int) -> None:
    model = made(tie_word_embeddings=tied, pad_token_id=3).to(torch.bfloat16)
    with torch.no_grad():
        before = model(IDS).logits
        embedding, head = model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()
    returned = model.resize_token_embeddings(**arguments)
    assert returned is model.get_input_embeddings()
    kept = min(size, 101)
    for new, old in ((returned.weight, embedding), (model.lm_head.weight, head)):
        assert new.shape == (size, 64)
        assert new.dtype == torch.bfloat16
        assert new.requires_grad
        assert torch.equal(new[:kept], old[:kept])
        if size > 101:
            mean = old.float().mean(dim=0).to(torch.bfloat16)
            assert torch.equal(new[101:], mean.expand(size - 101, -1))
    assert (model.lm_head.weight is returned.weight) == tied
    assert model.config.vocab_size == returned.num_embeddings == model.lm_head.out_features == size
    with torch.no_grad():
        after = model(IDS).logits
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=0.02, atol=0.02)


@tied_or_not
def test_a_resized_model_travels(tmp_path: Any, tied: bool) -> None:
    model = made(tie_word_embeddings=tied)
    model.resize_token_embeddings(110)
    model.save_pretrained(tmp_path)
    again = Qwen2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_padding_token_is_not_cut_off() -> None:
    model = made(pad_token_id=100)
    with pytest.raises(InputError, match=r"new_num_tokens=100 .*pad_token_id=100"):
        model.resize_token_embeddings(100)
    assert model.config.vocab_size == 101
    model(IDS)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "9", 2**24 + 1, 10**30], ids=str)
def test_a_size_of_vocabulary_that_cannot_be_is_named(size: Any) -> None:
    model = Qwen2ForCausalLM(small_config())
    for given in ({"new_num_tokens": size}, {"pad_to_multiple_of": size}):
        with pytest.raises(InputError, match="new_num_tokens="):
            model.resize_token_embeddings(**given)
    assert model.config.vocab_size == small_config().vocab_size


def test_a_model_without_a_head_is_resized_too() -> None:
    model = Qwen2Model(small_config())
    model.resize_token_embeddings(120)
    new = model(torch.tensor([[119]])).last_hidden_state
    mean = model.embed_tokens.weight[: SMALL["vocab_size"]].mean(dim=0).view(1, 1, -1)
    assert relative_error(new, model(inputs_embeds=mean).last_hidden_state) < 1e-5
    assert model.get_output_embeddings() is None


@tied_or_not
def test_replacing_the_embedding_keeps_the_tie(tied: bool) -> None:
    model = made(tie_word_embeddings=tied)
    table = torch.nn.Embedding(101, 64)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table is model.model.embed_tokens
    assert (model.lm_head.weight is table.weight) == tied


@tied_or_not
def test_tied_weights_are_one_and_stay_one(tied: bool) -> None:
    model = made(tie_word_embeddings=tied)
    for same in (model, copy.deepcopy(model), model.double()):
        assert (same.lm_head.weight is same.model.embed_tokens.weight) == tied
    size = sum(p.numel() for p in Qwen2Model(small_config()).parameters())
    assert model.num_parameters() == size + (0 if tied else 101 * 64)
    model.model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == (0 if tied else 101 * 64)


# -- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rotary_frequencies_stay_in_float32(dtype: torch.dtype) -> None:
    model = made(rope_theta=1e6).to(dtype)
    found = model.model.rotary_emb.inv_freq
    assert found.dtype == torch.float32
    assert torch.equal(found, inverse_frequencies(model.config.rope(), 16))
    assert model.dtype == dtype
    assert model(IDS).logits.dtype == dtype
    cos, _ = model.model.rotary_emb(torch.tensor([[10_000]]))
    exact = (10_000 * found.double()).cos()
    torch.testing.assert_close(cos[0, 0, :8].double(), exact, rtol=0, atol=1e-3)
    copied = copy.deepcopy(model).to("cpu", torch.float32)
    assert torch.equal(copied.model.rotary_emb.inv_freq, found)


def test_a_model_on_the_meta_device_is_filled_by_to_empty_and_a_state_dict() -> None:
    model = made()
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(small_config())
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(IDS).logits, model(IDS).logits)


def test_initial_weights() -> None:
    config = small_config(initializer_range=0.3, pad_token_id=4)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.27 < float(parameter.detach().std()) < 0.33, name
    assert not model.model.embed_tokens.weight[4].any()
    half = Qwen2ForCausalLM.from_config(config, dtype=torch.float16)
    assert half.dtype == torch.float16


# -- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradient_checkpointing_gives_the_same_gradients(padded: bool) -> None:
    model = made(tie_word_embeddings=True).train()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]) if padded else None

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    calls: list[int] = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found = gradients()
    assert len(calls) == 2  # once forward, once recomputed
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert model(IDS).past_key_values is None
    with pytest.warns(UserWarning, match="use_cache=True has no effect"):
        model(IDS, use_cache=True)
    assert model.eval()(IDS).past_key_values is not None
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# -- backends --------------------------------------------------------------------------------


def test_the_backend_can_be_changed() -> None:
    model = made(attn_implementation="eager")
    with torch.no_grad():
        eager = model(IDS).logits
        model.set_attn_implementation("sdpa")
        sdpa = model(IDS).logits
    assert relative_error(sdpa, eager) < 1e-5
    with pytest.raises(UnsupportedBackendError, match="'fast' has to be one of"):
        model.set_attn_implementation("fast")
    assert model.config.attn_implementation == "sdpa"


def test_a_model_takes_the_configuration_of_its_family() -> None:
    with pytest.raises(InputError, match=r"takes a quintet\.Qwen2Config, not a quintet\."):
        Qwen2Model(PreTrainedConfig())
    assert isinstance(made(), Qwen2PreTrainedModel)
    assert made().config_class is Qwen2Config
    assert made().can_generate()
    assert not Qwen2Model(small_config()).can_generate()
