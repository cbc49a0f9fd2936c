"""What a step of the optimisers costs, beside PyTorch's own for the same numbers, in turns.

    python benchmarks/optimizers.py [--rounds N]

The packaged model's geometry, and a Qwen2 of 30 M parameters; one thread, times of the processor,
the best of all rounds. PyTorch's Muon takes single matrices only, so it gets every expert's apart.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from quintet import AutoConfig, AutoModelForCausalLM, Qwen2Config, demo_model
from quintet.training.optimizers import OptimizerSettings, build_optimizers
from quintet.training.optimizers.groups import Group, grouped
from quintet.training.progress import Progress


def configs() -> dict[str, object]:
    """Return the configuration of each model."""
    wide = Qwen2Config(
        vocab_size=16_000,
        hidden_size=448,
        intermediate_size=1216,
        num_hidden_layers=10,
        num_attention_heads=7,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return {"demo": AutoConfig.from_pretrained(demo_model()), "Qwen2, 30 M": wide}


def matrices(groups: list[Group]) -> list[Tensor]:
    """Return every matrix that Muon moves as a parameter of its own, with a gradient."""
    found = []
    for group in groups:
        for member in group.members if group.kind == "muon" else ():
            p = member.parameter.detach()
            for matrix in p.reshape(-1, p.shape[-2] // group.matrices, p.shape[-1]):
                apart = matrix.clone().requires_grad_()
                apart.grad = torch.randn_like(apart) * 1e-3
                found.append(apart)
    return found


def others(groups: list[Group]) -> list[Tensor]:
    """Return copies of what AdamW moves beside Muon, with gradients."""
    found = []
    for group in groups:
        for member in group.members if group.kind == "adamw" else ():
            copied = member.parameter.detach().clone().requires_grad_()
            copied.grad = torch.randn_like(copied) * 1e-3
            found.append(copied)
    return found


def contenders(config: object) -> dict[str, Callable[[], object]]:
    """Return a step of each, over parameters of its own."""
    steps: dict[str, Callable[[], object]] = {}
    for kind in ("adamw", "muon"):
        model = AutoModelForCausalLM.from_config(config).float()
        groups = grouped(model, OptimizerSettings(kind=kind))
        optimizers = build_optimizers(model, OptimizerSettings(kind=kind))
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        at = Progress(0, 0, 0.0)
        steps[f"{kind}, ours"] = lambda optimizers=optimizers, at=at: optimizers.step(at)
        steps[f"{kind}, ours with its clipping"] = lambda optimizers=optimizers, at=at: (
            optimizers.clip(),
            optimizers.step(at),
        )
        rest = others(groups)
        if kind == "adamw":
            steps["adamw, PyTorch's default"] = torch.optim.AdamW(rest).step
            steps["adamw, PyTorch's foreach"] = torch.optim.AdamW(rest, foreach=True).step
        else:
            apart = torch.optim.Muon(matrices(groups), adjust_lr_fn="match_rms_adamw")
            beside = torch.optim.AdamW(rest)
            steps["muon, PyTorch's"] = lambda apart=apart, beside=beside: (
                apart.step(),
                beside.step(),
            )
    return steps


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| model | step | ms |\n|---|---|---|")
    for name, config in configs().items():
        torch.manual_seed(0)
        steps = contenders(config)
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(rounds + 1):
            for each, step in steps.items():
                started = time.process_time()
                step()
                best[each] = min(best[each], time.process_time() - started)
        for each, seconds in best.items():
            print(f"| {name} | {each} | {1000 * seconds:.1f} |")


if __name__ == "__main__":
    main()
