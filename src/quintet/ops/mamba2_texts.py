"""Mamba-2's mixer over packed texts whose lengths only the device knows.

The tokens of all texts stand in one packed row of M. Memory holds, of each text in a row of its
own, the last inputs of the convolution and the state. Nothing here reads a length on the host.
Axis letters as in `quintet.ops.mamba2`.
"""

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.kernels.ssm import MixerWeights
from quintet.ops.mamba2 import mix_stepwise
from quintet.triton.texts import Texts


@operation("mamba2 over texts")
def mix_texts(
    projected: Tensor,
    weights: MixerWeights,
    *,
    texts: Texts,
    window: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the tokens of each text, continuing from its row of memory in place.

    Returns what is projected back (M, H·P), the convolved channels (M, C), and the step sizes
    (M, H).

    Shapes: projected (M, H·P + C + H), the gate before x, b, c before dt; window (R, W - 1, C) and
    state (R, H, P, N), neither where every text begins with zeros and nothing is kept.

    Args:
        texts: which tokens are whose; as `texts.ends` says, so not a rectangle.
    """
    assert texts.ends is not None
    n, counts = texts.n, texts.ends.diff()
    token = torch.arange(len(projected), dtype=torch.int32, device=projected.device)
    text = torch.searchsorted(texts.ends[1:], token, right=True)
    place = (token - texts.ends[text]).long()
    padded = projected.new_zeros(n, texts.most, projected.shape[1])
    padded[text, place] = projected
    before, initial = (None if x is None else _read(x, texts) for x in (window, state))
    mixed = mix_stepwise(padded, weights, before, initial, counts.long(), chunk_size=64)
    for memory, new in ((window, mixed.window), (state, mixed.state)):
        if memory is not None:
            _write(memory, new, texts)
    return mixed.out[text, place], mixed.convolved[text, place], mixed.dt[text, place]


def _read(memory: Tensor, texts: Texts) -> Tensor:
    """Read each text's memory (n, ...), zeros where it has none."""
    if texts.rows is None:
        return memory[: texts.n].clone()
    stored = memory[texts.rows.clamp(min=0)]
    return torch.where((texts.rows >= 0).view(-1, *[1] * (stored.ndim - 1)), stored, 0)


def _write(memory: Tensor, new: Tensor, texts: Texts) -> None:
    """Write each text's new memory into its row."""
    if texts.rows is None:
        memory[: texts.n] = new
        return
    R = len(memory)
    # Of each row, which text it holds; what is nowhere goes to a row more.
    holds = torch.full((R + 1,), -1, dtype=torch.long, device=memory.device)
    which = torch.arange(texts.n, dtype=torch.long, device=memory.device)
    holds[torch.where(texts.rows < 0, R, texts.rows)] = which
    writes = (holds[:R] >= 0).view(-1, *[1] * (memory.ndim - 1))
    memory.copy_(torch.where(writes, new[holds[:R].clamp(min=0)], memory))
