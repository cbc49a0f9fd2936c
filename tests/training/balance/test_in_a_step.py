"""Losses and biases of experts in a step of a training, however it is cut into parts."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families.deepseek import model_of
from quintet import PreTrainedModel
from quintet.errors import ConfigError
from quintet.modeling.balance import BiasBalancer
from quintet.training import train
from quintet.training.balance import BalanceLoss, SequenceBalance, SwitchBalance, TokenDropping
from quintet.training.batch import Batch
from quintet.training.objectives import LanguageModelling
from quintet.training.progress import Progress
from quintet.training.step import StepOutcome, accumulate
from trainings import Heard, material, settings

START = Progress(step=0, tokens=0, done=0.0)
IDS = torch.randint(1, 101, (4, 12), generator=torch.Generator().manual_seed(0))
SEQ = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 9 + [1] * 3, [0] * 2 + [1] * 10])


def model() -> PreTrainedModel:
    made: PreTrainedModel = model_of("DeepseekV3", num_nextn_predict_layers=1).train()
    return made


def parts(*sizes: int) -> list[Batch]:
    rows = zip(IDS.split(list(sizes)), SEQ.split(list(sizes)), strict=True)
    return [Batch(input_ids=ids, labels=ids, seq_idx=index) for ids, index in rows]


def stepped(
    balance: list[BalanceLoss], cut: list[Batch], trained: PreTrainedModel | None = None
) -> tuple[StepOutcome, dict[str, Tensor], Tensor]:
    trained = model() if trained is None else trained
    objective = LanguageModelling(prediction=0.3, balance=balance)
    with BiasBalancer(trained) as balancer:
        found = accumulate(trained, objective, cut, START, nullcontext)  # type: ignore[arg-type]
        loads = balancer.loads()
    return found, {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}, loads


@pytest.mark.parametrize("drops", [False, True])
def test_cut_into_parts_a_step_learns_the_same_of_all_its_experts(drops: bool) -> None:
    balance: list[BalanceLoss] = [SwitchBalance(0.5, 0.1, scope="global"), SequenceBalance(0.5)]
    made = []
    for sizes in ((4,), (1, 2, 1)):
        trained = model()
        if drops:
            # What goes beyond a budget depends on the part; what is exempt does not.
            TokenDropping(trained, devices=4, exempt=1.0)
        made.append(stepped(balance, parts(*sizes), trained))
    (whole, expected, loads), (cut, found, counted) = made
    assert set(whole.terms) == {
        *("next_token", "prediction_1", "auxiliary", "router_z", "sequence_balance")
    }
    for name, term in whole.terms.items():
        assert cut.terms[name] == pytest.approx(term, rel=1e-6)
    size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    error = torch.cat([(found[n] - g).flatten() for n, g in expected.items()]).norm()
    assert (error / size).item() < 1e-6
    # Looking at the parts beforehand is no part of it.
    assert torch.equal(loads, counted)
    assert loads.sum(dim=1).tolist() == [IDS.numel() * 3] * 3


def test_the_experts_of_prediction_layers_are_balanced_too() -> None:
    with_loss, without = (
        stepped(balance, parts(4))[1]["model.layers.3.mlp.gate.weight"]
        for balance in ([SequenceBalance(1.0)], [])
    )
    assert (with_loss - without).norm() > 1e-3 * without.norm()


def test_a_part_by_itself_is_balanced_otherwise() -> None:
    micro = SwitchBalance(0.5, scope="micro")
    whole, cut = (stepped([micro], parts(*sizes))[0] for sizes in ((4,), (1, 2, 1)))
    assert cut.terms["auxiliary"] > whole.terms["auxiliary"] * 1.001


def test_a_table_of_settings_has_all_of_it(tmp_path: Path) -> None:
    root = material(tmp_path)
    every = {
        "bias": {"kind": "deepseek-v3-bias", "speed": 0.5},
        "sequence": 0.1,
        **dict.fromkeys(("expert", "device", "communication", "auxiliary", "z"), 0.1),
        **{"devices": 2, "reached": 1},
    }
    losses = []
    for number, more in enumerate(({}, {"capacity": 0.5, "exempt": 0.0})):
        config = settings(
            root,
            tmp_path / f"run{number}",
            "deepseek_v3",
            balance=every | more,
            objective={"prediction": 0.3},
            train={"steps": 1, "parts": 2},
        )
        heard = Heard()
        trained = train(config, report=heard).model
        losses.append(heard.records[0].loss)
        assert {"sequence_balance", "device_balance", "auxiliary"} < heard.records[0].terms.keys()
        biases = [b for n, b in trained.named_buffers() if n.endswith("correction_bias")]
        assert len(biases) == 2
        assert all(bias.any() for bias in biases)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.modules())
    assert losses[0] != losses[1]
    for table, told in (({"capacity": 0}, "capacity"), ({"exempt": 2}, "exempt")):
        with pytest.raises(ConfigError, match=rf"\[balance\] {told} = "):
            settings(root, tmp_path / "wrong", balance=table)
