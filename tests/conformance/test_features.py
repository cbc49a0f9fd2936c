"""What every family and every head of it can do besides computing the right numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quintet
from comparisons import TOLERANCE, batch
from conformance.families import Family, each, each_head
from conformance.heads import B, T, ids_of, labels_of, made, result
from quintet.errors import InputError
from support import relative_error

AUTO = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


# -- where it is found -----------------------------------------------------------------------


@each_head
def test_it_is_exported_and_found_by_the_auto_classes(
    family: Family, head: str, tmp_path: Path
) -> None:
    assert family.prefix + head in quintet.__all__
    assert f"{family.prefix}Config" in quintet.__all__
    assert f"{family.prefix}PreTrainedModel" in quintet.__all__
    model = made(family, head)
    assert isinstance(model, getattr(quintet, f"{family.prefix}PreTrainedModel"))
    auto = getattr(quintet, AUTO[head])
    assert type(auto.from_config(model.config)) is type(model)
    model.save_pretrained(tmp_path)
    assert type(quintet.AutoConfig.from_pretrained(tmp_path)) is family.cls("Config")
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    with torch.no_grad():
        ids = ids_of()
        assert relative_error(result(again(ids)), result(model(ids))) < TOLERANCE


# -- outputs ---------------------------------------------------------------------------------


@torch.no_grad()
@each_head
def test_states_and_weights_are_returned_when_asked_for(family: Family, head: str) -> None:
    model = made(family, head, use_cache=False)
    ids, config = ids_of(), model.config
    plain = model(ids)
    assert not {"hidden_states", "attentions", "router_logits"} & set(plain)
    asked = model(ids, output_hidden_states=True, output_attentions=True)
    assert relative_error(result(asked), result(plain)) < TOLERANCE
    assert [tuple(x.shape) for x in asked.hidden_states] == (
        [(B, T, config.hidden_size)] * (config.num_hidden_layers + 1)
    )
    assert torch.equal(asked.hidden_states[0], model.get_input_embeddings()(ids))
    base = model.base_model(ids).last_hidden_state
    assert relative_error(asked.hidden_states[-1], base) < TOLERANCE
    assert len(asked.attentions) == len(family.attends(config))
    for weights in asked.attentions:
        assert weights.shape == (B, config.num_attention_heads, T, T)
        assert relative_error(weights.sum(-1), torch.ones(weights.shape[:3])) < TOLERANCE
        assert not weights.triu(1).any()
    config.output_hidden_states = config.output_attentions = True
    assert {"hidden_states", "attentions"} <= set(model(ids))


@torch.no_grad()
@pytest.mark.parametrize("head", ["Model", "ForCausalLM"])
@each
def test_router_logits_are_returned_when_asked_for(family: Family, head: str) -> None:
    model = made(family, head)
    ids, layers = ids_of(), family.routes(model.config)
    if not layers:
        with pytest.raises(TypeError, match="output_router_logits"):
            model(ids, output_router_logits=True)
        return
    assert "router_logits" not in model(ids)
    routed = model(ids, output_router_logits=True).router_logits
    experts = {key for key in ("num_experts", "n_routed_experts") if hasattr(model.config, key)}
    E = getattr(model.config, experts.pop())
    assert [tuple(x.shape) for x in routed] == [(B * T, E)] * len(layers)
    if head == "ForCausalLM":
        # Where training needs them for its loss, they are still not part of the output.
        assert "router_logits" not in model.train()(ids, labels=ids)
    model.config.output_router_logits = True
    assert "router_logits" in model(ids)


@torch.no_grad()
@each
def test_outputs_index_like_tuples_and_dicts(family: Family) -> None:
    model = made(family, "ForCausalLM")
    ids = ids_of()
    asked = {"output_router_logits": True} if family.routes(model.config) else {}
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True, **asked)
    assert out[0] is out.loss is out["loss"]
    assert out[list(out).index("logits")] is out.logits
    assert out[:2] == tuple(out.values())[:2]
    names = ["loss", "logits", "past_key_values", "hidden_states", "attentions", *asked]
    assert [name for name in out if name != "aux_loss"] == [
        x.removeprefix("output_") for x in names
    ]
    assert "aux_loss" not in out or list(out)[1] == "aux_loss"
    plain = model(ids)
    assert list(plain) == ["logits", "past_key_values"]
    assert "attentions" not in plain
    assert plain.attentions is None
    with pytest.raises(KeyError):
        plain["attentions"]


@torch.no_grad()
@each_head
def test_return_dict_false_is_the_same_as_a_tuple(family: Family, head: str) -> None:
    model = made(family, head)
    ids = ids_of()
    asked = {**labels_of(head), "output_hidden_states": True}
    out = model(ids, **asked)
    plain = model(ids, **asked, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(out)
    for mine, other in zip(plain, out.values(), strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(mine, other)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


# -- inputs ----------------------------------------------------------------------------------


@torch.no_grad()
@each_head
def test_inputs_embeds_stand_for_ids(family: Family, head: str) -> None:
    model = made(family, head)
    ids = ids_of()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(result(model(inputs_embeds=embeds)), result(model(ids)))


@torch.no_grad()
@each
def test_logits_to_keep_takes_counts_and_positions(family: Family) -> None:
    model = made(family, "ForCausalLM")
    ids = ids_of()
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
    assert relative_error(model(ids, logits_to_keep=2).logits, whole[:, -2:]) < TOLERANCE
    places = torch.tensor([1, 5, 6])
    assert relative_error(model(ids, logits_to_keep=places).logits, whole[:, places]) < TOLERANCE
    with pytest.raises(InputError, match="logits_to_keep=-1"):
        model(ids, logits_to_keep=-1)


@torch.no_grad()
@each
def test_a_callers_own_4d_mask_is_used_as_it_is(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(B, 6)
    seen = torch.ones(6, 6).tril().bool()
    seen[4, 1] = False
    added = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    for way in family.ways:
        model = made(family, "Model", attn_implementation=family.backend(way, monkeypatch))
        if model.config.recurrent_layers():
            with pytest.raises(InputError, match="4 axes"):
                model(ids, attention_mask=added)
            continue
        boolean = result(model(ids, attention_mask=seen[None, None]))
        assert relative_error(result(model(ids, attention_mask=added)), boolean) < TOLERANCE
        plain = result(model(ids))
        assert relative_error(boolean[:, :4], plain[:, :4]) < TOLERANCE
        assert relative_error(boolean[:, 4:], plain[:, 4:]) > 1e-3


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        pytest.param({}, ["exactly one of input_ids and inputs_embeds"], id="nothing"),
        pytest.param({"input_ids": [[5, 101]]}, ["[0, 1]", "101", "0 to 100"], id="id-high"),
        pytest.param({"input_ids": [[-1]]}, ["-1", "0 to 100"], id="id-negative"),
        pytest.param({"input_ids": [[]]}, ["(1, 0)", "no token"], id="empty"),
        pytest.param({"input_ids": [3, 4]}, ["(2,)", "(batch, tokens)"], id="one-axis"),
        pytest.param(
            {"input_ids": [[1, 2]], "attention_mask": [[1]]}, ["(1, 1)", "(1, 2)"], id="mask"
        ),
    ],
)
@each_head
def test_bad_input_is_named(
    family: Family, head: str, inputs: dict[str, Any], words: list[str]
) -> None:
    tensors = {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
    with pytest.raises(InputError) as caught:
        made(family, head)(**tensors)
    for word in words:
        assert word in str(caught.value)


SEEN = torch.ones(5, 5, dtype=torch.bool).tril()
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mask-added": (
        {"attention_mask": torch.tensor([[-1e9, 0, 0, 0, 0]] * 2)},
        "holds -1e09|holds -1000",
    ),
    "mask-counted": ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2]] * 2)}, "holds 2"),
    "mask-list": ({"attention_mask": [[1] * 5] * 2}, "attention_mask is a list"),
    "mask-complex": ({"attention_mask": torch.ones(2, 5, dtype=torch.complex64)}, "complex64"),
    "mask-4d-integers": ({"attention_mask": ~SEEN[None, None] * -9999}, "holds -9999"),
    "mask-4d-heads": ({"attention_mask": SEEN.expand(2, 3, 5, 5)}, r"\(2, 3, 5, 5\).*second axis"),
    "mask-4d-keys": ({"attention_mask": SEEN[None, None, :, :3]}, r"last axis has to be 5"),
    "positions-bool": ({"position_ids": torch.ones(2, 5, dtype=torch.bool)}, "torch.bool"),
    "slots-list": ({"cache_position": [0, 1, 2, 3, 4]}, "cache_position is a list"),
    "slots-float": ({"cache_position": torch.arange(5.0)}, "torch.float32"),
    "past-none": ({"past_key_values": ((None, None),) * 2}, r"past_key_values\[0\] is a tuple"),
}


@pytest.mark.parametrize("wrong", WRONG)
@each
def test_what_a_forward_cannot_use_is_named(family: Family, wrong: str) -> None:
    inputs, words = WRONG[wrong]
    with pytest.raises(InputError, match=words):
        family.model_of(**family.shallow)(torch.randint(1, 101, (2, 5)), **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_embeddings_in_a_dtype_the_layers_cannot_take_are_named(
    family: Family, dtype: torch.dtype
) -> None:
    model = family.model_of(**family.shallow).to(dtype)
    embeds = model.get_input_embeddings()(torch.randint(1, 101, (2, 5))).detach()
    for other in (torch.float64, torch.float32, torch.bfloat16, torch.long, torch.complex64):
        given = embeds.to(other)
        if other.is_floating_point and torch.promote_types(other, dtype) == dtype:
            assert model(inputs_embeds=given).logits.dtype == dtype
            continue
        with pytest.raises(InputError, match=f"{other} and the model computes in {dtype}"):
            model(inputs_embeds=given)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs_embeds=embeds.float()).logits.shape == (2, 5, 101)


@pytest.mark.parametrize(
    "places", [None, True, 1.5, -1, [1], torch.tensor([7]), torch.tensor([0.5])]
)
@each
def test_positions_of_logits_that_cannot_be_are_named(family: Family, places: Any) -> None:
    model, ids = family.model_of(**family.shallow), torch.randint(1, 101, (2, 5))
    with pytest.raises(InputError, match="logits_to_keep="):
        model(ids, logits_to_keep=places)
    chosen = torch.tensor([True, False, False, True, False])
    assert torch.equal(model(ids, logits_to_keep=chosen).logits, model(ids).logits[:, chosen])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        pytest.param({"labels": [[1]]}, ["(1, 1)", "(1, 2)"], id="labels"),
        pytest.param({"labels": [[1, 101]]}, ["101"], id="label-high"),
        pytest.param({"cache_position": [4, 5]}, ["starts at 4"], id="gap"),
        pytest.param({"cache_position": [0, 2]}, ["consecutive"], id="jump"),
    ],
)
@each
def test_bad_input_of_a_language_model_is_named(
    family: Family, inputs: dict[str, Any], words: list[str]
) -> None:
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    with pytest.raises(InputError) as caught:
        made(family, "ForCausalLM")(torch.tensor([[1, 2]]), **tensors)
    for word in words:
        assert word in str(caught.value)


@each_head
def test_an_unknown_argument_is_refused(family: Family, head: str) -> None:
    with pytest.raises(TypeError, match="output_attention"):
        made(family, head)(ids_of(), output_attention=True)


# -- heads -----------------------------------------------------------------------------------


@torch.no_grad()
@each
def test_token_logits_are_read_off_the_states(family: Family) -> None:
    model = made(family, "ForTokenClassification")
    ids, mask, _ = batch("right")
    states = model.base_model(ids, attention_mask=mask).last_hidden_state
    expected = states @ model.score.weight.T + model.score.bias
    labels = torch.randint(3, ids.shape).masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    assert relative_error(out.logits, expected) < TOLERANCE
    told = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert relative_error(out.loss, told) < TOLERANCE


@torch.no_grad()
@each
def test_starts_and_ends_are_read_off_the_states(family: Family) -> None:
    model = made(family, "ForQuestionAnswering")
    ids, mask, _ = batch("left")
    states = model.base_model(ids, attention_mask=mask).last_hidden_state
    expected = states @ model.qa_outputs.weight.T + model.qa_outputs.bias
    # What lies behind the end was cut off, and counts for nothing.
    starts = torch.tensor([8, 9, 900])
    out = model(ids, attention_mask=mask, start_positions=starts, end_positions=starts + 1)
    assert relative_error(out.start_logits, expected[..., 0]) < TOLERANCE
    assert relative_error(out.end_logits, expected[..., 1]) < TOLERANCE
    # No span begins or ends in padding.
    among = expected.masked_fill(mask[..., None] == 0, -torch.inf)
    told = [torch.nn.functional.cross_entropy(among[:2, :, i], starts[:2] + i) for i in range(2)]
    assert relative_error(out.loss, sum(told) / 2) < TOLERANCE


@each
def test_a_classifier_without_pad_token_takes_one_row(family: Family) -> None:
    model = made(family, "ForSequenceClassification", pad_token_id=None)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 3)
    with pytest.raises(InputError, match="pad_token_id"):
        model(torch.tensor([[1, 2], [3, 4]]))


@each()
@pytest.mark.parametrize("padded", [False, True], ids=["ones", "padded"])
def test_gradients_pass_what_is_returned(family: Family, padded: bool) -> None:
    model = family.model_of("ForCausalLM", attn_implementation="eager")
    ids = torch.randint(5, 90, (2, 7))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    output = model(
        ids,
        attention_mask=mask,
        labels=ids,
        use_cache=False,
        output_hidden_states=True,
        # The weights of padded rows are copies, in the columns of the mask.
        output_attentions=not padded,
    )
    returned = [*output.hidden_states, *(output.attentions or ())]
    for tensor in returned:
        tensor.retain_grad()
    output.loss.backward()
    for tensor in returned:
        assert tensor.grad is not None
        assert tensor.grad.any()
