"""Cases of training; each process compares with one that trains alone."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from parallel.cases.tensor import family
from quintet import Qwen2Config, Qwen2ForCausalLM
from quintet.cli.train_banner import banner
from quintet.modeling.balance import BiasBalancer
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.scoring import HeadInParts
from quintet.ops.linear_loss import logit_sums
from quintet.parallel.layout import Parts
from quintet.parallel.world import World
from quintet.training import TrainingConfig, loop, train
from quintet.training.batch import Batch
from quintet.training.building import balance_losses, prediction_layers
from quintet.training.config import BalanceSettings, TrainSettings
from quintet.training.data import DataSettings, SourceSettings
from quintet.training.joining import joined, parallelize
from quintet.training.objective import Objective
from quintet.training.objectives import Distillation, LanguageModelling, Preference
from quintet.training.optimizers import Optimizers, OptimizerSettings, build_optimizers
from quintet.training.optimizers.layout import LOCAL, Layout
from quintet.training.parallel import ParallelSettings
from quintet.training.progress import Progress
from quintet.training.ranks import Alone, Ranks
from quintet.training.records import Beginning
from quintet.training.resuming import Resume
from quintet.training.settings import SettingError
from quintet.training.step import StepOutcome, accumulate, take
from support import relative_error
from trainings import Heard

# How the experts of each family are kept busy alike: over each text, and over a whole step.
LOSSES: Mapping[str, dict[str, Any]] = {
    "qwen2-moe": {"auxiliary": 0.1, "z": 0.1, "scope": "global"},
    "deepseek-v2": {"expert": 0.1, "device": 0.1, "devices": 2, "reached": 2},
    "deepseek-v3": {"sequence": 0.1},
}
BEGIN = Progress(0, 0, 0.0)
IDS = 101
Learned = tuple[StepOutcome, dict[str, Tensor]]


def config_of(degrees: Mapping[str, Any], **optimizer: Any) -> TrainingConfig:
    return TrainingConfig(
        data=DataSettings(sources=(SourceSettings(paths=("none",)),), context=16, batch_rows=4),
        train=TrainSettings(steps=1),
        optimizer=OptimizerSettings(**{"learning_rate": 1e-3, **optimizer}),
        parallel=ParallelSettings(**degrees),
    )


def rows_of(step: int, count: int) -> list[Batch]:
    """Return rows of which each counts something else, the second nothing at all."""
    # Each id once: that of padding, too, and in every process's part of the vocabulary.
    random = torch.Generator().manual_seed(step)
    rows = []
    for n, ids in enumerate(torch.randperm(IDS, generator=random)[: 25 * count].view(count, 1, 25)):
        labels = ids.clone()
        labels[:, : 25 if n == 1 else 2 * n] = -100
        rows.append(Batch(input_ids=ids, labels=labels, texts=1))
    return rows


def objective_of(model: CausalLMHead, balance: Mapping[str, Any]) -> LanguageModelling:
    depth = prediction_layers(model)
    return LanguageModelling(
        z_loss=0.1,
        label_smoothing=0.1,
        prediction=0.3 if depth else None,
        balance=balance_losses(BalanceSettings(**balance)),
        depth=max(depth, 1),
    )


def own(rows: list[Batch], ranks: Ranks) -> list[Batch]:
    index, shares = ranks.share
    return rows[index::shares]


def learned(
    model: CausalLMHead,
    objective: Objective,
    rows: list[Batch],
    ranks: Ranks | None = None,
    layout: Layout = LOCAL,
) -> Learned:
    """Return the outcome and the gradients of a step."""
    ranks = ranks or Alone()
    optimizers = build_optimizers(model, config_of({}).optimizer, layout)
    parts = own(rows, ranks)
    outcome = accumulate(model, objective, parts, BEGIN, torch.enable_grad, ranks, layout)
    made = gradients_of(model, optimizers)
    norm = math.hypot(*optimizers.scalars().values())
    return replace(outcome, norm=norm), made


def gradients_of(model: CausalLMHead, optimizers: Optimizers) -> dict[str, Tensor]:
    optimizers.clip(float("inf"))
    layout = optimizers.layout
    found = {}
    for name, parameter in model.named_parameters():
        gradient = optimizers.gradient(name) if parameter.requires_grad else None
        if gradient is not None:
            found[name] = layout.whole(name, gradient).clone()
    return found


def several_texts(rows: list[Batch]) -> list[Batch]:
    """Return rows as they are, one of several texts, one with padding behind, and one before."""
    plain, packed, *padded = rows
    columns = torch.arange(packed.input_ids.shape[1])[None]
    found = [plain, replace(packed, seq_idx=(columns > 8).long() + (columns > 11), texts=3)]
    for row, mask in zip(padded, (columns < 18, columns > 3), strict=True):
        labels = row.labels.masked_fill(~mask, -100)
        found.append(replace(row, labels=labels, attention_mask=mask.long()))
    return found


def short(rows: list[Batch]) -> list[Batch]:
    """Return the last tokens of rows."""
    return [replace(x, input_ids=x.input_ids[:, -4:], labels=x.labels[:, -4:]) for x in rows]


def gradients(
    name: str,
    changes: dict[str, Any],
    degrees: dict[str, Any],
    balance: dict[str, Any],
    make: Callable[[list[Batch]], list[Batch]] = list,
) -> None:
    """Compare the loss and every gradient of a step whose rows count differently."""
    told = json.dumps(changes), json.dumps(balance)
    alone = _gradients_alone(name, *told, make)
    compare(name, changes, degrees, make, lambda model: objective_of(model, balance), alone)


@cache
def _gradients_alone(
    name: str, changes: str, balance: str, make: Callable[[list[Batch]], list[Batch]]
) -> Learned:
    # It is the same however the others divide it.
    model = family(name).model_of(**json.loads(changes)).train()
    return learned(model, objective_of(model, json.loads(balance)), make(rows_of(0, 4)))


def other_objectives(name: str, degrees: dict[str, Any]) -> None:
    """Compare the loss and every gradient of what is no text."""
    teacher = family(name).model_of().eval().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    kept = partial(_same, Distillation(teacher, 2.0, 0.5))
    compare(name, {}, degrees, several_texts, kept)
    for loss in ("sigmoid", "ipo"):
        objective = Preference(0.1, loss=loss, reference=teacher)
        compare(name, {}, degrees, pairs_of, partial(_same, objective))


def _same(objective: Objective, model: CausalLMHead) -> Objective:
    return objective


def pairs_of(rows: list[Batch]) -> list[Batch]:
    """Return rows as pairs of answers, two of them."""

    def together(*rows: Batch) -> Batch:
        ids = torch.cat([row.input_ids for row in rows])
        labels = torch.cat([row.labels for row in rows])
        return Batch(input_ids=ids, labels=labels, texts=len(rows))

    return [together(*rows[:2]), together(*rows[2:])]


def compare(
    name: str,
    changes: dict[str, Any],
    degrees: dict[str, Any],
    make: Callable[[list[Batch]], list[Batch]],
    objective_of: Callable[[CausalLMHead], Objective],
    by_one: Learned | None = None,
) -> None:
    """Compare the loss and every gradient of a step in processes with those of one."""
    config = config_of(degrees)
    rows = make(rows_of(0, 4))
    if by_one is None:
        model = family(name).model_of(**changes).train()
        by_one = learned(model, objective_of(model), rows)
    model = family(name).model_of(**changes).train()
    ranks = joined(config.parallel)
    layout = parallelize(model, config, ranks)
    together, made = learned(model, objective_of(model), rows, ranks, layout)
    alone, wanted = by_one
    assert abs(alone.loss - together.loss) < 1e-5 * abs(alone.loss)
    assert together.norm == pytest.approx(alone.norm, rel=1e-5)
    assert together.terms == pytest.approx(alone.terms, rel=1e-4, abs=1e-6)
    # Of stages, each has the gradients of its own layers.
    held = {path for path, _ in model.named_parameters()}
    assert set(made) == set(wanted) & held
    wanted = {path: gradient for path, gradient in wanted.items() if path in held}
    for path, gradient in wanted.items():
        error = relative_error(made[path], gradient)
        assert error < 1e-5, f"{path}: {error}"


def run(config: TrainingConfig, resume: Resume = False) -> tuple[dict[int, float], list[str]]:
    """Run a training, and return the losses of its steps and what was warned of."""
    heard = Heard()
    train(config, resume=resume, report=heard)
    return heard.losses, heard.warnings


class Told(Heard):
    """A reporter that remembers how it began, too."""

    beginning: Beginning | None = None

    def started(self, beginning: Beginning) -> None:
        self.beginning = beginning


def told(config: TrainingConfig) -> tuple[Any, ...]:
    """Run a training, and return what was told of it."""
    train(config, report=(heard := Told()))
    balance = [record.balance for record in heard.records]
    written = [sample.text for sample in heard.samples]
    if heard.beginning is None:
        return heard.losses, heard.evaluations, written, balance, ""
    model = banner(heard.beginning, config)[0]
    return heard.losses, heard.evaluations, written, balance, model


def refused(config: TrainingConfig) -> str:
    """Return what a training is refused with."""
    with pytest.raises(SettingError) as told, patch.object(loop, "prepared", side_effect=[]):
        train(config)
    return str(told.value)


def heads(degrees: dict[str, Any], vocabulary: int) -> None:
    """Compare what losses read of a head, and its gradients, with the definition."""
    world = World.of(ParallelSettings(**degrees).degrees(2), torch.device("cpu"))
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    whole = model.lm_head.weight.detach().clone().requires_grad_()
    labels = torch.cat([torch.arange(vocabulary), torch.tensor([-100])])
    hidden = torch.randn(len(labels), 8)
    parts = Parts.cut(model, world)
    found = []
    for states in (hidden.clone().requires_grad_(), hidden.clone().requires_grad_()):
        if not found:
            made = logit_sums(states @ whole.T, labels.clamp(min=0), mean=True)
            made = made.map(lambda x: torch.where(labels >= 0, x, 0))
        else:
            head = model.scored_head()
            assert isinstance(head, HeadInParts)
            made = head.sums(states, labels, mean=True)
        loss = sum(
            (x * torch.arange(1.0, len(labels) + 1)).sum() * (i + 1) for i, x in enumerate(made)
        )
        loss.backward()
        found.append((torch.stack(list(made)), states.grad))
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert relative_error(ours, wanted) < 1e-5
    own = parts.own["lm_head.weight"].of(whole.grad)
    assert own.numel() == 0 or relative_error(model.lm_head.weight.grad, own) < 1e-5


def balances(
    degrees: dict[str, Any], count: int, *, recompute: bool, rate: float = 0.01
) -> tuple[Any, float]:
    """Return the biases of a skewed model's routers after some steps, and its last MaxVio."""
    config = config_of(degrees, learning_rate=1e-5)
    ranks = joined(config.parallel)
    model = skewed()
    if recompute:
        model.activation_checkpointing_enable()
    layout = parallelize(model, config, ranks)
    optimizers = build_optimizers(model, config.optimizer, layout)
    objective = LanguageModelling()
    with BiasBalancer(model) as balancer:
        last = torch.zeros_like(balancer.loads())
        for step in range(count):
            at = Progress(step, 0, step / count)
            parts = own(rows_of(step, 4), ranks)
            take(model, objective, optimizers, parts, at, torch.enable_grad, ranks)
            loads = ranks.summed(balancer.loads())
            if step >= count - 20:
                last += loads
            # As in a training the rate ends at nothing.
            balancer.step(rate * (1 - step / count), loads)
        violation = max(balancer.violations(last).values())
        biases = [b.tolist() for n, b in model.named_buffers() if n.endswith("correction_bias")]
    return biases, violation


def skewed() -> CausalLMHead:
    """Return a DeepSeek-V3 of 16 experts whose routers prefer some of them."""
    torch.manual_seed(0)
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    model = family("deepseek-v3").model_of(**experts, num_hidden_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(0.1)
        for name, bias in model.named_buffers():
            if name.endswith("correction_bias"):
                bias.zero_()[:4] += 0.1
    return model.train()


def steps(name: str, degrees: dict[str, Any], count: int, optimizer: dict[str, Any]) -> None:
    """Compare the weights after some steps."""
    config = config_of(degrees, **optimizer)
    models = [family(name).model_of().train() for _ in range(2)]
    ranks = joined(config.parallel)
    layout = parallelize(models[1], config, ranks)
    for model, where, who in zip(models, (LOCAL, layout), (Alone(), ranks), strict=True):
        optimizers = build_optimizers(model, config.optimizer, where)
        for step in range(count):
            at = Progress(step, 0, step / count)
            parts = own(rows_of(step, 4), who)
            outcome = take(
                model, objective_of(model, {}), optimizers, parts, at, torch.enable_grad, who
            )
            assert outcome.skipped is None
    whole = dict(models[0].named_parameters())
    for path, parameter in models[1].named_parameters():
        made = layout.whole(path, layout.local(parameter.detach()))
        error = relative_error(made, whole[path].detach())
        assert error < 1e-4, f"{path}: {error}"
