"""Trainings of a few milliseconds: texts, a tokenizer, models of all kinds, and their settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
from quintet.training.config import TrainingConfig
from quintet.training.records import End, Evaluation, GeneratedSample, Saved, Silent, StepRecord
from quintet.training.settings import build

__all__ = ["MODELS", "Heard", "material", "settings"]

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"num_key_value_heads": 1},
    "qwen2_moe": {
        "num_key_value_heads": 1,
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
        **EXPERTS,
    },
    "deepseek_v2": {**LATENT, **EXPERTS, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, **EXPERTS, "num_nextn_predict_layers": 1},
    "zamba2": {
        "num_key_value_heads": 2,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 4,
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}


def material(root: Path) -> Path:
    """Write a tokenizer and texts into a folder, and return it."""
    tiny.trained_tokenizer().save_pretrained(root / "tokenizer")
    (root / "texts").mkdir()
    for number in range(8):
        lines = tiny.TEXT[number % 4 :] + tiny.TEXT[: number % 4]
        (root / "texts" / f"{number}.txt").write_text("".join(lines) * 2)
    answers = ["Hello there.", "How are you today?", "The quick brown fox.", "Be brief."]
    chats = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    pairs = [
        {"prompt": ask, "chosen": answer, "rejected": answer[::-1]}
        for ask, answer in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    for name, records in (("chats", chats), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    (root / "held.txt").write_text("".join(tiny.TEXT[1:3]))
    return root


def settings(root: Path, folder: Path, kind: str = "qwen2", **tables: Any) -> TrainingConfig:
    """Return settings of a training of a few steps; `tables` are what is to be different."""
    values: dict[str, Any] = {
        "model": {"config": {"model_type": kind, **SMALL, **MODELS[kind]}},
        "tokenizer": {"from": str(root / "tokenizer")},
        "data": {
            "sources": [{"paths": [str(root / "texts")]}],
            "context": 16,
            "batch_rows": 3,
            "cache": str(root / "cache"),
        },
        "optimizer": {"learning_rate": 3e-3},
        "train": {"folder": str(folder), "steps": 6},
    }
    for name, table in tables.items():
        if "files" in table:
            table = {"sources": [{"paths": [str(root / table["files"])]}]}
        held = values.setdefault(name, {})
        held |= table
        values[name] = {key: value for key, value in held.items() if value is not None}
    return build(TrainingConfig, values)


class Heard(Silent):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.warnings: list[str] = []
        self.saves: list[Saved] = []
        self.evaluations: list[Evaluation] = []
        self.samples: list[GeneratedSample] = []
        self.ends: list[End] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)

    def warned(self, message: str) -> None:
        self.warnings.append(message)

    def saved(self, saved: Saved) -> None:
        self.saves.append(saved)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def sampled(self, sample: GeneratedSample) -> None:
        self.samples.append(sample)

    def ended(self, end: End) -> None:
        self.ends.append(end)

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each step, by its number."""
        return {record.step: record.loss for record in self.records}
