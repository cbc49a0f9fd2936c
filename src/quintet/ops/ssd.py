"""The selective state space of Mamba-2, "state-space duality" (arXiv:2405.21060).

Each head h keeps a state S (P, N) and computes, with its scalar A < 0 and D,

    S_t = exp(dt_t·A) · S_{t-1} + dt_t · x_t ⊗ b_t
    y_t = S_t · c_t + D · x_t

where b and c, the paper's B and C, are shared by the heads of a group. `recurrence` is the
definition; `ssd` computes the same for many tokens by matrix products, `ssd_step` for one.

Axis letters: B batch, T tokens, H heads, P head size, N state size, G groups, R = H/G heads of a
group, K chunks of L tokens. Shapes: x (B, T, H, P), dt (B, T, H), A and D (H,), b and c
(B, T, G, N), state (B, H, P, N). All is computed in the dtype of `dt`, float32 or better: over a
long text, rounded decays would add up.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.ops.transforms import recorded

# The decays within a chunk take L numbers a token and head; beyond this, reading and writing them
# costs more than shorter matrix products do.
LONGEST_CHUNK = 64


def step_sizes(
    dt: Tensor, bias: Tensor, limits: tuple[float, float], counts: Tensor | int | None
) -> Tensor:
    """Return softplus(dt + bias) within `limits`, 0 for padding.

    Shapes: dt (B, T, H), bias (H), counts (B,) how many of the T are real, None for all.
    """
    dtype = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(dtype) + bias.to(dtype)).clamp(*limits)
    return dt if counts is None else only(dt, counts)


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, P) and the last state, token by token: the definition."""
    (_, T, H, _), G = x.shape, b.shape[2]
    x, b, c = (v.to(dt.dtype) for v in (x, b, c))
    b, c = (v.repeat_interleave(H // G, dim=2) for v in (b, c))  # (B, T, H, N)
    if state is None:
        state = torch.zeros_like(x[:, 0, :, :, None] * b[:, 0, :, None])
    outputs = []
    for t in range(T):
        decay = (dt[:, t] * A).exp()[..., None, None]
        taken = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = decay * state + taken
        outputs.append((state * c[:, t, :, None]).sum(dim=-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor,
    state: Tensor | None,
    *,
    chunk_size: int = LONGEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H, P) and the last state, chunk by chunk (arXiv:2405.21060, §6).

    Within a chunk the tokens meet as in attention, (c·bᵀ ∘ decay)·x; from chunk to chunk the state
    carries on. The result does not depend on `chunk_size`, only the memory and time it takes.
    """
    B, T, H, P = x.shape
    G = b.shape[2]
    L = min(chunk_size, LONGEST_CHUNK) if recorded() else min(chunk_size, LONGEST_CHUNK, T)
    K = -(-T // L)
    if _is_any(T):
        # An exported program of any length cannot be told how many chunks that makes.
        L, K = T, 1
    A, D = A.to(dt.dtype), D.to(dt.dtype)

    def chunked(v: Tensor) -> Tensor:
        # Tokens with dt = 0 fill up the last chunk.
        v = F.pad(v.to(dt.dtype), (0, 0) * (v.ndim - 2) + (0, K * L - T))
        return torch.unflatten(v, 1, (K, L))

    b, c = (chunked(v).transpose(2, 3) for v in (b, c))  # (B, K, G, L, N)
    heads = torch.unflatten(chunked(x), 3, (G, -1)).permute(0, 1, 3, 4, 2, 5)  # (B, K, G, R, L, P)
    steps = torch.unflatten(chunked(dt), 3, (G, -1)).permute(0, 1, 3, 4, 2)  # (B, K, G, R, L)
    taken = heads * steps[..., None]
    decay = steps * A.view(G, -1, 1)  # its logarithm
    so_far = decay.cumsum(dim=-1)
    since = so_far.exp()
    between = _between(decay)
    until = between[..., -1, :]

    added = torch.einsum("bkgln,bkgrlp->bkgrpn", b, taken * until[..., None])
    if state is None:
        state = torch.zeros_like(added[:, 0])
    else:
        state = torch.unflatten(state.to(dt.dtype), 1, (G, -1))
    starts, state = _passed_on(added, so_far[..., -1], state)
    y = torch.einsum("bkgln,bkgrpn->bkgrlp", c, starts) * since[..., None]

    met = (c @ b.transpose(-1, -2))[:, :, :, None] * between  # (B, K, G, R, L, L)
    y = y + met @ taken + D.view(G, -1, 1, 1) * heads
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(B, K * L, H, P)
    return y[:, :T], state.flatten(1, 2)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y (B, 1, H, P) of one token and the state, which is overwritten.

    Where autograd records, the old state may still be needed and a new one is returned.
    """
    B, _, H, P = x.shape
    G, N = b.shape[2:]
    x = x.to(dt.dtype)
    b = b.to(dt.dtype).reshape(B * G, 1, N)
    c = c.to(dt.dtype).reshape(B * G, N, 1)
    decay = (dt[:, 0] * A).exp()[..., None, None]
    taken = (x * dt[..., None]).view(B * G, H // G * P, 1)
    if torch.is_grad_enabled() and (state.requires_grad or taken.requires_grad):
        state = torch.baddbmm((state * decay).view(B * G, -1, N), taken, b).view_as(state)
    else:
        state.mul_(decay).view(B * G, -1, N).baddbmm_(taken, b)
    y = torch.bmm(state.view(B * G, -1, N), c).view(B, 1, H, P)
    return y + D.to(dt.dtype)[:, None] * x, state


def _is_any(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def _passed_on(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state at the start of each chunk (B, K, G, R, P, N), and the last one.

    Shapes: added (B, K, G, R, P, N), by each chunk; decay (B, K, G, R), the logarithm of what it
    leaves of a state; state (B, G, R, P, N), before the first.
    """
    if recorded():
        # No loop over chunks, of which there may be another number.
        added = torch.cat((state[:, None], added), dim=1)
        between = _between(F.pad(decay, (0, 0, 0, 0, 1, 0)).movedim(1, -1))  # (B, G, R, K+1, K+1)
        states = torch.einsum("bgrkj,bjgrpn->bkgrpn", between, added)
        return states[:, :-1], states[:, -1]
    starts, decayed = [], decay.exp()[..., None, None]
    for k in range(added.shape[1]):
        starts.append(state)
        state = torch.addcmul(added[:, k], state, decayed[:, k])
    return torch.stack(starts, dim=1), state


def _between(decay: Tensor) -> Tensor:
    """Return exp(Σ decay_i, s < i <= l) for tokens s <= l of a chunk, else 0: (..., L, L).

    Each sum is made by itself. A difference of two running sums would cancel: tokens that forget
    everything would blur the decays among those after them.
    """
    L = decay.shape[-1]
    after = torch.ones(L, L, dtype=torch.bool, device=decay.device).tril(-1)
    sums = torch.where(after, decay[..., None], 0.0).cumsum(dim=-2)
    return torch.where(after.mT, -torch.inf, sums).exp()


def only(dt: Tensor, counts: Tensor | int) -> Tensor:
    """Set dt (B, T, H) to 0 behind the first `counts` tokens, of all rows or each."""
    places = torch.arange(dt.shape[1], dtype=torch.long, device=dt.device)
    real = places < (counts[:, None] if isinstance(counts, Tensor) else counts)
    return dt * real[..., None]
