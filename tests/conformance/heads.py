"""Models with a head: how one is made, what it learns from, and where its results are."""

from typing import Any

import torch
from torch import Tensor

from conformance.families import Family

__all__ = ["B", "T", "ids_of", "labels_of", "made", "objective", "result"]

B, T = 2, 9


def made(family: Family, head: str, **changes: Any) -> Any:
    """A model with every branch of the family's first thorough variant."""
    variant = family.variants[family.thorough[0]]
    return family.model_of(head, **{**variant, "num_labels": 3, "pad_token_id": 0, **changes})


def ids_of(B: int = B, T: int = T) -> Tensor:
    return torch.randint(1, 101, (B, T))


def labels_of(head: str) -> dict[str, Tensor]:
    """What a head learns from; nothing for a model without one."""
    if head == "ForQuestionAnswering":
        starts = torch.randint(T, (B,))
        return {"start_positions": starts, "end_positions": starts}
    shapes = {"ForCausalLM": (B, T), "ForTokenClassification": (B, T)}
    if head == "Model":
        return {}
    return {"labels": torch.randint(3, shapes.get(head, (B,)))}


def result(out: Any) -> Tensor:
    """The logits, those of start and end side by side; without a head the last hidden state."""
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), dim=-1)
    made: Tensor = out["logits" if "logits" in out else "last_hidden_state"]
    return made


def objective(model: Any, head: str, ids: Tensor, labels: dict[str, Tensor]) -> Tensor:
    # Experts that shall be in balance are part of the loss.
    model.config.output_router_logits = True
    out = model(ids, **labels)
    made: Tensor = out.last_hidden_state.square().mean() if head == "Model" else out.loss
    return made
