"""The short depthwise causal convolution of state-space layers.

Axis letters: B batch, T tokens, C channels, W taps.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def continued(x: Tensor, window: Tensor | None, W: int) -> Tensor:
    """Prepend the last W - 1 inputs to `x` (B, T, C), zeros at the start of a text."""
    if window is None:
        return F.pad(x, (0, 0, W - 1, 0))
    return torch.cat((window, x), dim=1)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y_t = bias + Σ_w weight_w · x_{t+w}, for x from `continued`.

    The sum is made in float32. Shapes: weight (C, W), bias (C); returns (B, T, C).
    """
    W = weight.shape[1]
    T = x.shape[1] - W + 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(dtype).unbind(dim=1)
    wide = x.to(dtype)
    y = torch.zeros((), dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    for w in range(W):
        y = torch.addcmul(y, wide[:, w : w + T], taps[w])
    return y.to(x.dtype)


def last_window(x: Tensor, W: int, counts: Tensor | int | None) -> Tensor:
    """Return the last W - 1 inputs (B, W - 1, C) before token `counts`.

    Shapes: x `continued`, (B, W - 1 + T, C); counts (B,) how many of the T are real, None for all.
    """
    if counts is None:
        counts = x.shape[1] - W + 1
    if not isinstance(counts, Tensor):
        return x[:, counts : counts + W - 1]
    places = counts[:, None] + torch.arange(W - 1, dtype=torch.long, device=x.device)
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
