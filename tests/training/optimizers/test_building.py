"""All that moves a model's weights, as one."""

import copy

import pytest
import torch

from quintet import Qwen2Config, Qwen2ForCausalLM
from quintet.training.optimizers import OptimizerSettings, build_optimizers
from quintet.training.progress import Progress


@pytest.fixture(scope="module")
def untrained() -> Qwen2ForCausalLM:
    """A model to be copied."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def taken(model: Qwen2ForCausalLM, step: int) -> None:
    """Give every parameter the gradient of a step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_steps_as_torchs_does(untrained: Qwen2ForCausalLM) -> None:
    model, twin = copy.deepcopy(untrained), copy.deepcopy(untrained)
    settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
    optimizers = build_optimizers(model, settings)
    decayed = [p for p in twin.parameters() if p.ndim > 1]
    others = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        for each in (model, twin):
            taken(each, step)
        ours = optimizers.clip()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        torch.testing.assert_close(ours, norm)
        optimizers.step(Progress(step, 0, 0.0))
        theirs.step()
        optimizers.zero_grad()
        theirs.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
