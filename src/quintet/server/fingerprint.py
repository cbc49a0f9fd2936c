"""A fingerprint of model, weights and formats."""

import hashlib

import torch

import quintet
from quintet.modeling.base import PreTrainedModel

# Of each tensor, numbers from its whole length; weights that were trained differ everywhere.
SAMPLES = 16


def fingerprint(model: PreTrainedModel, bits: int | None = None) -> str:
    """Return a fingerprint of all that determines answers: version, weights, formats, cache bits.

    It is the same in every process that holds the same model in the same way.
    """
    seen = hashlib.sha256(f"{quintet.__version__} {bits} {model.dtype}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:
            seen.update(_sampled(tensor.detach()))
    return f"fp_{seen.hexdigest()[:10]}"


def _sampled(tensor: torch.Tensor) -> bytes:
    if not tensor.is_contiguous():
        # Flattened it would be copied as a whole.
        tensor = tensor[(0,) * (tensor.ndim - 1)]
    flat = tensor.reshape(-1)
    chosen = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
    return bytes(chosen.contiguous().view(torch.uint8).cpu().tolist())
