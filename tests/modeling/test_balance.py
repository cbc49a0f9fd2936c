"""Tokens are counted once and biases move by them, whatever a training does around its steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from families.deepseek import model_of
from families.qwen2_moe import model_of as qwen2_moe
from quintet import PreTrainedModel
from quintet.errors import InputError
from quintet.layers.routing import SigmoidRouter
from quintet.modeling.balance import BiasBalancer, ExpertLoads, LoadBalancer, balance_metrics
from quintet.ops.routing import balanced_bias

IDS = torch.randint(1, 101, (3, 16), generator=torch.Generator().manual_seed(0))
ACTIVE = 3


def trained(family: str = "DeepseekV3", **changes: object) -> PreTrainedModel:
    model = model_of(family, **changes).train()
    for bias in biases(model, copied=False).values():
        bias.zero_()
    return model


def biases(model: PreTrainedModel, *, copied: bool = True) -> dict[str, Tensor]:
    held = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    return {n: b.clone() for n, b in held.items()} if copied else held


def mean(values: Iterator[float] | list[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
def test_loads_even_out_as_biases_move() -> None:
    model = trained(num_nextn_predict_layers=1)
    ids = torch.randint(0, 101, (8, 32))
    with LoadBalancer(model, rate=0.02) as balancer:
        history = []
        for _ in range(60):
            model(ids, output_mtp_logits=True)
            history.append(mean(list(balancer.violations().values())))
            balancer.step()
            assert not balancer.loads().any()
    assert len(balancer.routers) == len(biases(model)) == 3
    assert history[-1] < history[0] / 2


@torch.no_grad()
def test_what_is_counted_is_every_choice_of_every_token_until_it_ends() -> None:
    model = trained()
    balancer = BiasBalancer(model, rate=0.0)
    before = biases(model)
    model(IDS)
    model(IDS)
    assert balancer.loads().sum(dim=1).tolist() == [2 * IDS.numel() * ACTIVE] * 2
    balancer.step()
    assert all(torch.equal(b, before[n]) for n, b in biases(model).items())
    balancer.close()
    model(IDS)
    assert not balancer.loads().any()
    assert balancer.violations() == balancer.metrics() == {}


@torch.no_grad()
def test_padding_is_not_counted_and_packed_rows_are_as_their_texts_alone() -> None:
    model = trained(num_nextn_predict_layers=1)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    texts = [row[kept.bool()] for row, kept in zip(IDS, mask, strict=True)]
    packed = torch.cat(texts)[None]
    numbers = torch.cat([torch.full((len(text),), i) for i, text in enumerate(texts)])[None]
    with ExpertLoads(model) as loads:
        found = []
        for given in (
            [{"input_ids": IDS, "attention_mask": mask}],
            [{"input_ids": packed, "seq_idx": numbers, "use_cache": False}],
            [{"input_ids": text[None]} for text in texts],
        ):
            for options in given:
                model(**options, output_mtp_logits=True)
            found.append(loads.loads())
            loads.clear()
    # Behind a text's end a prediction layer reads nothing, and it is one token, whatever packs it.
    assert found[0].sum(dim=1).tolist() == [int(mask.sum()) * ACTIVE] * 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def recomputed(model: PreTrainedModel, way: str) -> Callable[..., object]:
    if way == "by the caller":
        return lambda ids: checkpoint(lambda x: model(x, labels=x).loss, ids, use_reentrant=False)
    if way != "not":
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    return lambda ids: model(ids, labels=ids, mtp_loss_weight=0.3).loss


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_biases_are_the_same_bits_with_and_without_recomputation(way: str) -> None:
    made = []
    for own in ("not", way):
        model = trained(num_nextn_predict_layers=1)
        run = recomputed(model, own)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with BiasBalancer(model, rate=0.01) as balancer:
            loads = []
            for _ in range(4):
                # In two parts, with an evaluation between them and the step.
                for part in IDS.split(2):
                    run(part).backward()  # type: ignore[attr-defined]
                model.eval()(IDS)
                model.train()
                optimizer.step()
                optimizer.zero_grad()
                loads.append(balancer.loads())
                balancer.step()
        made.append((torch.stack(loads), biases(model)))
    (once, expected), (again, found) = made
    assert once[0].sum(dim=1).tolist() == [IDS.numel() * ACTIVE] * 3
    assert torch.equal(once, again)
    assert all(torch.equal(found[name], bias) for name, bias in expected.items())
    assert any(bias.any() for bias in expected.values())


def test_what_others_recompute_is_counted_once() -> None:
    model = trained()
    with ExpertLoads(model, training=True) as loads:
        recomputed(model, "by the caller")(IDS).backward()  # type: ignore[attr-defined]
        assert loads.loads().sum(dim=1).tolist() == [IDS.numel() * ACTIVE] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_tokens_go_where_they_went_first_though_biases_moved_before_the_backward_pass(
    reentrant: bool,
) -> None:
    gradients = []
    for recomputes in (False, True):
        model = trained(num_nextn_predict_layers=1)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(IDS, labels=IDS, mtp_loss_weight=0.3).loss
        for bias in biases(model, copied=False).values():
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
        # A second pass over the same graph recomputes a second time.
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
        assert error < 1e-5, name


def test_experts_of_every_family_are_counted_and_those_of_none_refused() -> None:
    for model in (trained("DeepseekV2"), qwen2_moe()):
        with torch.no_grad(), ExpertLoads(model) as loads:
            model(IDS % 50)
        numbers = loads.metrics()
        assert numbers["worst_violation"] == max(loads.violations().values())
        assert 0 < numbers["load_entropy"] <= 1
    with pytest.raises(InputError, match="no experts"):
        ExpertLoads(torch.nn.Linear(2, 2))


def test_metrics_follow_their_definitions() -> None:
    even, skewed = torch.tensor([5, 5, 5, 5]), torch.tensor([10, 10, 0, 0])
    assert balance_metrics([even, skewed]) == {
        "max_violation": 0.5,
        "worst_violation": 1.0,
        "load_entropy": pytest.approx(0.75),
        "dead_experts": 2.0,
    }
    assert balance_metrics([]) == {}


def test_loads_of_several_processes_add_up_and_a_centred_update_keeps_the_mean() -> None:
    model = trained()
    ours = BiasBalancer(model, rate=0.01, centred=True)
    counted = torch.arange(16).view(2, 8) ** 2
    ours.step(0.5, loads=counted + counted)
    for bias, load in zip(biases(model).values(), counted, strict=True):
        sign = torch.sign(load.float().mean() - load)
        torch.testing.assert_close(bias, 0.5 * (sign - sign.mean()))
        assert abs(float(bias.mean())) < 1e-7
    # Sums too large for float32 are compared in whole numbers.
    close = torch.tensor([2**40, 2**40 + 1, 2**40 - 1, 2**40])
    assert balanced_bias(torch.zeros(4), close, 1.0).tolist() == [0, -1, 1, 0]
    with pytest.raises(InputError, match=r"loads have shape \(8,\); there are 2 routers of 8"):
        ours.step(loads=counted[0])
    with pytest.raises(InputError, match="rate=-1"):
        ours.step(-1)


@torch.no_grad()
def test_biases_of_frozen_routers_stay() -> None:
    model = trained()
    one, other = (m for m in model.modules() if isinstance(m, SigmoidRouter))
    one.weight.requires_grad_(False)
    with BiasBalancer(model, rate=0.1) as balancer:
        model(IDS)
        assert balancer.loads()[0].any()
        balancer.step()
    assert not one.e_score_correction_bias.any()
    assert other.e_score_correction_bias.any()
    with pytest.raises(InputError, match="all routers of this DeepseekV3ForCausalLM are frozen"):
        BiasBalancer(model.requires_grad_(False))


def test_models_without_such_routers_and_rates_that_are_none_are_errors() -> None:
    with pytest.raises(InputError, match="no router with a bias"):
        LoadBalancer(model_of("DeepseekV2"))
    for rate in (-1, float("nan")):
        with pytest.raises(InputError, match=f"rate={rate}"):
            LoadBalancer(model_of("DeepseekV3"), rate=rate)


def test_a_skewed_model_is_balanced_while_it_learns() -> None:
    model = trained(
        vocab_size=499,
        hidden_size=16,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=4,
    )
    biases(model, copied=False).popitem()[1][:4] = 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    loads = []
    with BiasBalancer(model) as balancer:
        for step in range(150):
            ids = torch.randint(0, 499, (8, 64), generator=generator)
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loads.append(balancer.loads())
            balancer.step(0.01 if step < 60 else 0.002)
    assert balance_metrics([*loads[0]])["worst_violation"] > 1.5
    # 512 tokens of few kinds are never quite even; what counts is that none is favoured.
    assert balance_metrics([*sum(loads[-20:])])["worst_violation"] < 0.2
