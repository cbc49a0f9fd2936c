"""The state space of Mamba-2 by mamba_ssm (arXiv:2405.21060), between kernels of this package."""

from importlib import import_module
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import Backend, Implementation
from quintet.kernels.ssm import MixerWeights
from quintet.published.packages import lacking, takes
from quintet.triton.texts import Texts

_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
# Tokens of a chunk, as the package's own modules have them.
_CHUNK = 256


class StateUpdate(Protocol):
    """The signature of `mamba_ssm.ops.triton.selective_state_update`."""

    def selective_state_update(
        self,
        state: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        *,
        dt_bias: Tensor,
    ) -> Tensor:
        """Change states (B, H, P, N) by a token each, and return y (B, H, P)."""
        ...


class ChunkScan(Protocol):
    """The signature of `mamba_ssm.ops.triton.ssd_combined`."""

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor,
        *,
        initial_states: Tensor | None,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, T, H, P) and states (B, H, P, N)."""
        ...


def mamba2(
    projected: Tensor,
    weights: MixerWeights,
    *,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Compute `ops.mamba2.mix_stepwise`; overwrite the state."""
    given = [projected, *(x for x in (*weights[:6], window, state, counts) if x is not None)]
    if not takes(*given):
        return None
    # The package needs Triton, so it is there.
    from quintet.triton import mamba2 as own

    return own.mamba2(
        projected,
        weights,
        window=window,
        state=state,
        counts=counts,
        through=through_states,
    )


def through_states(
    convolved: Tensor,
    dt: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, float],
    sizes: tuple[int, int, int, int],
    texts: Texts,
    before: Tensor | None,
    target: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `triton.ssm.through_states` for texts in a rectangle; write the states."""
    assert texts.ends is None
    assert target is not None
    (H, P, G, N), B, T, (bias, A_log, D) = sizes, texts.n, texts.most, scalars
    steps = F.softplus(dt.view(B, T, H).float() + bias.float()).clamp(*limits)
    if texts.counts is not None:
        place = torch.arange(T, dtype=torch.long, device=steps.device)
        steps = torch.where((place < texts.counts[:, None])[..., None], steps, 0.0)
    x, b, c = torch.split(convolved.view(B, T, -1), [H * P, G * N, G * N], dim=-1)
    x = torch.unflatten(x, -1, (H, P))
    b, c = (torch.unflatten(one, -1, (G, N)) for one in (b, c))
    A = -A_log.float().exp()
    if T > 1:
        package = import_module("mamba_ssm.ops.triton.ssd_combined")
        y, after = cast("ChunkScan", package).mamba_chunk_scan_combined(
            x, steps, A, b, c, _CHUNK, D, initial_states=before, return_final_states=True
        )
        target.copy_(after)
    else:
        if before is None:
            target.zero_()
        elif before is not target:
            target.copy_(before)
        package = import_module("mamba_ssm.ops.triton.selective_state_update")
        y = cast("StateUpdate", package).selective_state_update(
            target,
            # What it returns is rounded as this is.
            x[:, 0].float(),
            steps[:, 0, :, None].expand(B, H, P),
            A[:, None, None].expand(H, P, N),
            b[:, 0],
            c[:, 0],
            D.float()[:, None].expand(H, P),
            dt_bias=A.new_zeros(H, 1).expand(H, P),
        )
    return y.reshape(B * T, H * P).float().contiguous(), steps.view(B * T, H)


BACKEND = Backend(
    name="mamba-ssm",
    device="cuda",
    implementations={"mamba2": (Implementation(mamba2, _FLOATS, "rows of one length"),)},
    missing=lacking("mamba_ssm", 80),
    on_request=True,
)
