"""Biases balance the experts, and counting ends where it is asked to."""

import pytest
import torch

from families.deepseek import model_of
from quintet.errors import InputError
from quintet.modeling.balance import LoadBalancer


def violation(balancer: LoadBalancer) -> float:
    found = balancer.violations().values()
    return sum(found) / len(found)


@torch.no_grad()
def test_loads_even_out_as_biases_move() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=1)
    ids = torch.randint(0, 101, (8, 32))
    with LoadBalancer(model, rate=0.02) as balancer:
        history = []
        for _ in range(60):
            model(ids, output_mtp_logits=True)
            history.append(violation(balancer))
            balancer.step()
            assert not balancer.loads
    assert len(balancer.routers) == sum("e_score" in n for n, _ in model.named_buffers())
    assert history[-1] < history[0] / 2


@torch.no_grad()
def test_what_is_counted_is_every_choice_of_every_token_until_it_ends() -> None:
    model = model_of("DeepseekV3")
    ids = torch.randint(0, 101, (2, 7))
    balancer = LoadBalancer(model, rate=0.0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(ids)
    model(ids)
    chosen = 2 * ids.numel() * model.config.num_experts_per_tok
    assert all(int(load.sum()) == chosen for load in balancer.loads.values())
    balancer.step()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    balancer.close()
    model(ids)
    assert not balancer.loads


def test_models_without_such_routers_and_rates_below_zero_are_errors() -> None:
    with pytest.raises(InputError, match="no router with a bias"):
        LoadBalancer(model_of("DeepseekV2"))
    with pytest.raises(InputError, match="rate=-1"):
        LoadBalancer(model_of("DeepseekV3"), rate=-1)
