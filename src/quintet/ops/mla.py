"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1).

Keys and values of all heads are linear maps of one latent c_kv a token, so the latent is all that
is kept. With W_UK and W_UV the maps of a head, and ⊕ joining the part that carries positions,

    score = (q_nope ⊕ q_pe) · (W_UK c_kv ⊕ k_pe) = (W_UKᵀ q_nope ⊕ q_pe) · (c_kv ⊕ k_pe)
    out   = Σ p (W_UV c_kv)                      = W_UV (Σ p c_kv)

`expanded` computes the middle, `absorbed` the right-hand side: the same function at other costs,
of which `latent_attention` takes the one that suits so many queries. Where the maps are more than
their weights, with an adapter or a hook on them, there is the middle alone.

Shapes here: q_nope (B, H, T, Dn), q_pe (B, H, T, Dr), c_kv (B, S, R), k_pe (B, S, Dr), and w_kv
(H, Dn + Dv, R), a head's rows of W_UK before those of W_UV; `expand` maps c_kv by all of them, to
(B, S, H·(Dn + Dv)). Both return (B, H, T, Dv) and the weights (B, H, T, S), `expanded` only if its
backend has them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.kernels.linear import STEP_TOKENS, batch_invariant
from quintet.kernels.native import available
from quintet.ops.again import learn
from quintet.ops.attention import AttentionBackend, eager, in_range, sdpa
from quintet.ops.causal_learning import attend_learning, attends_learning
from quintet.ops.masks import AttentionMask, masked
from quintet.ops.one_pass import attend_in_one_pass, attend_latents
from quintet.ops.paged import attend_rows
from quintet.ops.transforms import recorded

# For R = 512, Dn = Dv = 128, Dr = 64, as in all released models, and each head and key: expanding
# a key costs 2·R·(Dn + Dv) FLOPs once, and saves each query 2·(2R + Dr) - 2·(Dn + Dr + Dv).
BREAK_EVEN_QUERIES = 171
# On kernels, which promise that a row does not see its mates (ADR 21): absorbing a text of so many
# tokens without a past costs 2 % of its forward.
MOST_ABSORBED = 128


def absorbs(T: int, S: int) -> bool:
    """Return whether T queries over S keys are cheaper absorbed than expanded.

    Expanding maps S keys, absorbing maps T queries and pays more for each pair of the two; they
    cost the same where 1/T = 1/S + 1/BREAK_EVEN_QUERIES. So a text without a past is expanded,
    a step of decoding is absorbed, and with a long past the queries decide alone.
    """
    return T * (S + BREAK_EVEN_QUERIES) < S * BREAK_EVEN_QUERIES


def _chooses_absorbed(T: int, c_kv: Tensor, attend: AttentionBackend) -> bool:
    # A program is made of torch's operations, and kernels for CPUs are looked for by none.
    kernels = attend is sdpa and c_kv.is_cpu and c_kv.dtype == torch.bfloat16 and not recorded()
    if kernels and available():
        # A piece of a prompt is computed as the whole is, if that is what is asked for.
        most = STEP_TOKENS if batch_invariant() else MOST_ABSORBED
        return most >= T
    # Of a batch, S is the longest row's.
    return absorbs(T, c_kv.shape[1])


def latent_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    expand: Callable[[Tensor], Tensor],
    w_kv: Tensor | None,
    mask: AttentionMask,
    *,
    attend: AttentionBackend,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attend in the cheaper of the two forms; only `eager` returns weights.

    Args:
        w_kv: what `expand` multiplies with; None if it does more, and has to be called.
    """
    T = q_nope.shape[2]
    if attend is not eager and not mask.custom and c_kv.is_cpu:
        c_kv, k_pe, mask = _reachable(c_kv, k_pe, mask, T)
    if w_kv is None or not _chooses_absorbed(T, c_kv, attend):
        return expanded(
            q_nope, q_pe, c_kv, k_pe, expand, mask, attend=attend, scale=scale, dropout=dropout
        )
    if mask.pages is not None and attend is sdpa and not dropout:
        output = _absorbed_rows(q_nope, q_pe, c_kv, k_pe, w_kv, mask, scale=scale)
        if output is not None:
            return output, None
    if attend is not eager and not mask.custom and not dropout:
        output = attend_latents(q_nope, q_pe, c_kv, k_pe, w_kv, start=mask.start, scale=scale)
        if output is not None:
            return output, None
    out, weights = absorbed(q_nope, q_pe, c_kv, k_pe, w_kv, mask, scale=scale, dropout=dropout)
    # Only `eager` promises weights; holding them for all layers would cost memory.
    return out, weights if attend is eager else None


def _reachable(
    c_kv: Tensor, k_pe: Tensor, mask: AttentionMask, T: int
) -> tuple[Tensor, Tensor, AttentionMask]:
    """Drop the keys behind the last query of all rows."""
    S = c_kv.shape[1]
    if torch.compiler.is_compiling() or (isinstance(mask.start, int) and mask.start + T == S):
        return c_kv, k_pe, mask
    end = min(S, _last(mask.start) + T)
    entries = None if mask.entries is None else mask.entries[..., :end]
    return c_kv[:, :end], k_pe[:, :end], replace(mask, entries=entries)


def _last(start: int | Tensor) -> int:
    return start if isinstance(start, int) else int(start.max())


def expanded(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    expand: Callable[[Tensor], Tensor],
    mask: AttentionMask,
    *,
    attend: AttentionBackend,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attend with each head's keys and values computed from the latents."""
    k_nope, v = _keys_and_values(q_nope, c_kv, expand)
    if attend is sdpa and not mask.custom and not dropout:
        q_parts, k_parts = (q_nope, q_pe), (k_nope, k_pe[:, None])
        output = attend_in_one_pass(
            q_parts, k_parts, v, start=mask.start, window=mask.window, scale=scale
        )
        if output is not None:
            return output, None
    q, k = _joined(q_nope, q_pe, k_nope, k_pe)
    if attend is sdpa and mask.is_causal and not dropout and attends_learning(q, k, v):
        return attend_learning(q, k, v, scale), None
    Dv = v.shape[-1]
    if attend is not eager:
        # Fused kernels want one head size; without it they give way to slower ones, or refuse.
        # Zeros change no score and are cut off the values again.
        D = max(q.shape[-1], Dv)
        q, k, v = (F.pad(x, (0, D - x.shape[-1])) for x in (q, k, v))
    out, weights = attend(q, k, v, mask, scale=scale, dropout=dropout)
    return out[..., :Dv], weights


def separate_texts(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    expand: Callable[[Tensor], Tensor],
    lengths: Sequence[int],
    *,
    scale: float,
) -> Tensor | None:
    """Attend as `expanded` within each packed text, or return None without a kernel.

    The tokens of all rows are texts of `lengths`.
    """
    if not learn(q_nope, c_kv):
        return None
    k_nope, v = _keys_and_values(q_nope, c_kv, expand)
    q, k = _joined(q_nope, q_pe, k_nope, k_pe)
    return attend_learning(q, k, v, scale, lengths) if attends_learning(q, k, v) else None


def _keys_and_values(
    q_nope: Tensor, c_kv: Tensor, expand: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (B, H, S, Dn) and (B, H, S, Dv) of the latents."""
    H, Dn = q_nope.shape[1], q_nope.shape[-1]
    kv = expand(c_kv).view(*c_kv.shape[:2], H, -1).transpose(1, 2)
    return kv[..., :Dn], kv[..., Dn:]


def _joined(q_nope: Tensor, q_pe: Tensor, k_nope: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    shared = k_pe[:, None].expand(-1, q_nope.shape[1], -1, -1)
    return torch.cat((q_nope, q_pe), dim=-1), torch.cat((k_nope, shared), dim=-1)


def absorbed(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    w_kv: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attend in latent space: all heads share one key and value of R + Dr numbers.

    The queries of all heads are rows of the same two products, so that a step of decoding reads
    the latents once for all heads and copies nothing.
    """
    B, H, T, Dn = q_nope.shape
    S = c_kv.shape[1]
    *wide, precision = in_range(q_nope, q_pe, c_kv, k_pe, w_kv[:, :Dn])
    with precision:
        scores = masked(_scores(*wide, scale=scale).view(B, H, T, S), mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q_nope.dtype)
    mixed = F.dropout(weights, dropout).flatten(1, 2) @ c_kv  # (B, H·T, R)
    by_head = mixed.view(B, H, T, -1).permute(1, 3, 0, 2).flatten(2)  # (H, R, B·T)
    out = w_kv[:, Dn:] @ by_head  # (H, Dv, B·T)
    return out.view(H, -1, B, T).permute(2, 0, 3, 1), weights


def _absorbed_rows(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    w_kv: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
) -> Tensor | None:
    """Attend as `absorbed` with lengths only the device knows, or return None."""
    Dn = q_nope.shape[-1]
    q_latent = torch.einsum("bhtd,hdr->bhtr", q_nope, w_kv[:, :Dn])
    mixed = attend_rows((q_latent, q_pe), (c_kv[:, None], k_pe[:, None]), None, mask, scale=scale)
    return None if mixed is None else torch.einsum("bhtr,hvr->bhtv", mixed, w_kv[:, Dn:])


def _scores(
    q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, w_uk: Tensor, *, scale: float
) -> Tensor:
    """Return (B, H·T, S)."""
    q_latent = torch.einsum("bhtd,hdr->bhtr", q_nope, w_uk)
    # What is cut out of something larger, a growing cache or w_kv, stands on the left and as it
    # lies: oneDNN copies a transposed slice first, which takes ten times as long as the product.
    positional = k_pe @ q_pe.flatten(1, 2).transpose(1, 2)  # (B, S, H·T)
    scores = torch.baddbmm(
        positional, c_kv, q_latent.flatten(1, 2).transpose(1, 2), beta=scale, alpha=scale
    )
    return scores.transpose(1, 2).contiguous()
