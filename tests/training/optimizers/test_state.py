"""The state of optimisers as named tensors, and weights of fewer bits than their masters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.families import FAMILIES, each
from quintet import LoraConfig
from quintet.errors import CheckpointError, ConfigError
from quintet.training.optimizers import (
    GroupSettings,
    Optimizers,
    OptimizerSettings,
    build_optimizers,
)
from quintet.training.optimizers.settings import Precision
from quintet.training.progress import Progress
from quintet.training.schedules import Cosine

PRECISIONS: tuple[Precision, ...] = ("float32", "autocast", "bfloat16")


@pytest.fixture(scope="module")
def untrained() -> Any:
    (family,) = [f for f in FAMILIES if f.name == "deepseek-v3"]
    return family.model_of(num_hidden_layers=2, n_routed_experts=4, n_group=1, topk_group=1)


def settings_of(kind: Any, precision: Precision = "float32") -> OptimizerSettings:
    return OptimizerSettings(
        kind=kind,
        learning_rate=0.02,
        schedule=Cosine(warmup=0.2),
        precision=precision,
        groups=(GroupSettings(match=("*.layers.0.mlp.*",), frozen=True),),
    )


def backward(model: Any, step: int) -> None:
    """Make gradients, and none for some parameters and some experts."""
    generator = torch.Generator().manual_seed(step)
    loss = torch.zeros(())
    for number, (name, p) in enumerate(model.named_parameters()):
        gradient = torch.randn(p.shape, generator=generator)
        if name.endswith("down_proj") and p.ndim == 3:
            gradient[step % 3] = 0
        if p.requires_grad and number % 5 != step % 4:
            loss = loss + (p.float() * gradient).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def steps(model: Any, optimizers: Optimizers, first: int, last: int) -> None:
    for step in range(first, last):
        # Two parts, that add up.
        backward(model, step)
        backward(model, 1000 + step)
        optimizers.clip()
        optimizers.step(Progress(step, 0, step / 10))
        optimizers.zero_grad()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_going_on_is_the_same_to_the_bit(
    kind: str, precision: Precision, untrained: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(untrained)
    optimizers = build_optimizers(model, settings_of(kind, precision))
    steps(model, optimizers, 0, 3)
    save_file(optimizers.tensors(), tmp_path / "optimizers.safetensors")
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    steps(model, optimizers, 3, 6)

    again = copy.deepcopy(untrained)
    resumed = build_optimizers(again, settings_of(kind, precision))
    for name, saved in load_file(tmp_path / "model.safetensors").items():
        again.get_parameter(name).data.copy_(saved)
    resumed.load(load_file(tmp_path / "optimizers.safetensors"))
    steps(again, resumed, 3, 6)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = optimizers.tensors(), resumed.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("kind", "precision", "each"),
    [
        ("adamw", "float32", 8),
        ("adamw", "bfloat16", 8 + 4),
        ("muon", "float32", 4),
        ("muon", "bfloat16", 4 + 4),
    ],
)
def test_what_it_keeps_of_a_matrix(
    kind: Any, precision: Precision, each: int, untrained: Any
) -> None:
    optimizers = build_optimizers(copy.deepcopy(untrained), settings_of(kind, precision))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    kept = [t for n, t in optimizers.tensors().items() if n.startswith(name) and t.ndim]
    assert sum(t.nbytes for t in kept) == each * untrained.get_parameter(name).numel()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("lm_head.weight.exp_avg"), "lm_head.weight.exp_avg is missing"),
        (lambda t: t.update(other=torch.ones(2)), "other has no place"),
        (
            lambda t: t.update({"lm_head.weight.step": torch.ones(2)}),
            r"lm_head.weight.step is float32 \(2,\), not float32 \(\)",
        ),
        (
            lambda t: t.update({"lm_head.weight.step": torch.ones((), dtype=torch.int64)}),
            r"lm_head.weight.step is int64 \(\), not float32 \(\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: Any, told: str, untrained: Any) -> None:
    optimizers = build_optimizers(copy.deepcopy(untrained), settings_of("adamw"))
    own = {name: tensor.clone() for name, tensor in optimizers.tensors().items()}
    wrong = {name: tensor + 1 for name, tensor in own.items()}
    change(wrong)
    with pytest.raises(CheckpointError, match=told):
        optimizers.load(wrong)
    assert all(torch.equal(own[name], tensor) for name, tensor in optimizers.tensors().items())


def test_a_parameter_without_a_gradient_stays(untrained: Any) -> None:
    for kind in ("adamw", "muon"):
        model = copy.deepcopy(untrained)
        optimizers = build_optimizers(model, settings_of(kind))
        steps(model, optimizers, 0, 2)
        before = {name: tensor.clone() for name, tensor in optimizers.tensors().items()}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizers.clip()
        optimizers.step(Progress(5, 0, 0.5))
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert all(torch.equal(t, before[name]) for name, t in optimizers.tensors().items())


class TestMasters:
    """Weights in bfloat16, and what is stepped in their place."""

    @staticmethod
    def of(untrained: Any, kind: str = "muon") -> tuple[Any, Optimizers]:
        model = copy.deepcopy(untrained)
        return model, build_optimizers(model, settings_of(kind, "bfloat16"))

    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_they_are_what_the_weights_would_be(self, kind: str, untrained: Any) -> None:
        whole = copy.deepcopy(untrained)
        exact = build_optimizers(whole, settings_of(kind))
        model, optimizers = self.of(untrained, kind)
        steps(whole, exact, 0, 4)
        steps(model, optimizers, 0, 4)
        # The gradients here do not depend on the weights, and are rounded to eight bits.
        for name, p in whole.named_parameters():
            if p.requires_grad:
                moved = (p - untrained.get_parameter(name)).norm()
                master = optimizers.tensors()[f"{name}.master"]
                assert (master - p).norm() <= 0.05 * moved
                assert torch.equal(model.get_parameter(name), master.to(torch.bfloat16))

    def test_small_steps_add_up_in_them(self, untrained: Any) -> None:
        model = copy.deepcopy(untrained)
        weight = model.model.norm.weight
        weight.data.fill_(1.0)
        settings = OptimizerSettings(learning_rate=1e-3, precision="bfloat16", weight_decay=0.0)
        optimizers = build_optimizers(model, settings)
        seen = []
        for step in range(8):
            weight.float().sum().backward()
            optimizers.step(Progress(step, 0, 0.0))
            optimizers.zero_grad()
            seen.append(weight[0].item())
        # Below 1, bfloat16 has the next number at .9961: a single step is nothing to it.
        assert seen[0] == 1.0
        assert seen[-1] == pytest.approx(0.992, abs=0.002)

    def test_gradients_add_up_in_float32(self, untrained: Any) -> None:
        model, optimizers = self.of(untrained)
        weight = model.lm_head.weight
        parts = [1.0, 2.0**-9, 2.0**-9, 2.0**-9]
        for part in parts:
            (weight * part).sum().backward()
            # At once: nothing in bfloat16 is kept beside.
            assert weight.grad is None
        gradient = optimizers.gradient("lm_head.weight")
        assert gradient is not None
        assert gradient.dtype == torch.float32
        # In bfloat16 each of the later ones would be lost.
        assert (gradient == sum(parts)).all()

    def test_what_is_not_rounded(self, untrained: Any) -> None:
        model, _ = self.of(untrained)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32

    def test_scalars_of_a_recurrence_are_their_own_masters(self) -> None:
        (family,) = [f for f in FAMILIES if f.name == "zamba2"]
        model = family.model_of()
        optimizers = build_optimizers(model, OptimizerSettings(precision="bfloat16"))
        assert model.model.layers[0].mamba.A_log.dtype == torch.float32
        assert "model.layers.0.mamba.in_proj.weight.master" in optimizers.tensors()
        assert "model.layers.0.mamba.A_log.master" not in optimizers.tensors()

    def test_adapters_are_their_own_masters(self, untrained: Any) -> None:
        model = copy.deepcopy(untrained)
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
        optimizers = build_optimizers(model, OptimizerSettings(precision="bfloat16"))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert not any(name.endswith(".master") for name in optimizers.tensors())

    @each
    def test_a_step_of_every_family(self, family: Any) -> None:
        model = family.model_of()
        ids = torch.arange(10)[None]
        settings = OptimizerSettings(kind="muon", precision="bfloat16", learning_rate=1e-3)
        with build_optimizers(model, settings) as optimizers:
            losses = []
            for step in range(3):
                loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
                assert optimizers.clip().isfinite()
                optimizers.step(Progress(step, 0, 0.0))
                optimizers.zero_grad()
                losses.append(loss.item())
        assert losses[-1] < losses[0]

    def test_closed_it_leaves_the_gradients_alone(self, untrained: Any) -> None:
        model, optimizers = self.of(untrained)
        with optimizers:
            pass
        backward(model, 0)
        assert any(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize("precision", ["float32", "autocast"])
    def test_without_them_weights_are_float32(self, precision: Any, untrained: Any) -> None:
        model = copy.deepcopy(untrained).to(torch.bfloat16)
        with pytest.raises(
            ConfigError, match=r'load the model with dtype="float32", or .*bfloat16'
        ):
            build_optimizers(model, settings_of("adamw", precision))


class TestClipping:
    """The norm of all gradients together."""

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_it_is_pytorchs(self, precision: Precision, untrained: Any) -> None:
        model = copy.deepcopy(untrained)
        optimizers = build_optimizers(model, settings_of("muon", precision))
        backward(model, 0)
        gradients = {n: g.clone() for n, g in self.of(model, optimizers).items()}
        for gradient in gradients.values():
            gradient.requires_grad_().grad = gradient.detach().clone()
        expected = torch.nn.utils.clip_grad_norm_(gradients.values(), 1.0)
        norm = optimizers.clip()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        for name, gradient in self.of(model, optimizers).items():
            torch.testing.assert_close(gradient, gradients[name].grad, rtol=1e-5, atol=1e-8)
        by_group = optimizers.scalars()
        whole = sum(value**2 for value in by_group.values()) ** 0.5
        assert whole == pytest.approx(norm.item(), rel=1e-5)

    @staticmethod
    def of(model: Any, optimizers: Optimizers) -> dict[str, Tensor]:
        found = {n: optimizers.gradient(n) for n, p in model.named_parameters() if p.requires_grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def test_what_is_small_is_left_as_it_is(self, untrained: Any) -> None:
        model = copy.deepcopy(untrained)
        optimizers = build_optimizers(model, settings_of("adamw"))
        backward(model, 0)
        before = {n: g.clone() for n, g in self.of(model, optimizers).items()}
        norm = optimizers.clip(1e6)
        assert all(torch.equal(g, before[n]) for n, g in self.of(model, optimizers).items())
        assert torch.equal(optimizers.clip(float("inf")), norm)

    def test_what_is_tied_counts_once(self) -> None:
        (family,) = [f for f in FAMILIES if f.name == "qwen2"]
        model = family.model_of(tie_word_embeddings=True)
        optimizers = build_optimizers(model, OptimizerSettings())
        model.lm_head.weight.sum().backward()
        assert optimizers.clip().item() == pytest.approx(model.lm_head.weight.numel() ** 0.5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_norm_that_is_not_finite_is_told(self, value: float, untrained: Any) -> None:
        model = copy.deepcopy(untrained)
        optimizers = build_optimizers(model, settings_of("adamw"))
        backward(model, 0)
        name, gradient = next(iter(self.of(model, optimizers).items()))
        gradient.view(-1)[3] = value
        before = {n: g.clone() for n, g in self.of(model, optimizers).items()}
        assert not optimizers.clip().isfinite()
        for each_name, kept in self.of(model, optimizers).items():
            assert torch.equal(kept.nan_to_num(), before[each_name].nan_to_num()), name

    def test_nothing_has_no_norm(self, untrained: Any) -> None:
        optimizers = build_optimizers(copy.deepcopy(untrained), settings_of("adamw"))
        assert optimizers.clip().item() == 0
