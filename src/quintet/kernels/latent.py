"""Latent attention in latent space, in bfloat16, alone or inside a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quintet.kernels.attention import COLUMNS
from quintet.kernels.calls import begin, firsts
from quintet.kernels.matrix import Matrix
from quintet.kernels.parts import Fields, Norm, Part


def attend_latents(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    w_kv: Tensor,
    *,
    start: int | Tensor,
    scale: float,
) -> Tensor | None:
    """Return what `ops.mla.absorbed` does, (B, H, T, Dv); None where the kernel does not apply.

    Query i of a row sees the latents up to slot `start` + i, and reads no other. Shapes: q_nope
    (B, H, T, Dn), q_pe (B, H, T, Dr), c_kv (B, S, R), k_pe (B, S, Dr), w_kv (H, Dn + Dv, R), start
    (B).
    """
    call = begin()
    if call is None or (q_nope.ndim, q_pe.ndim, c_kv.ndim, w_kv.ndim) != (4, 4, 3, 3):
        return None
    (B, H, T, Dn), (S, R), dtype = q_nope.shape, c_kv.shape[1:], torch.bfloat16
    Dr, Dv = q_pe.shape[-1], w_kv.shape[1] - Dn
    slots = firsts(start, B)
    if Dn % 2 or Dr % 2 or R % COLUMNS or Dv <= 0 or slots is None:
        return None
    call.integers(B, H, T, S, Dn, Dr, Dv, R)
    call.real(scale)
    call.rows(q_nope, dtype, B, H, T, Dn)
    call.rows(q_pe, dtype, B, H, T, Dr)
    call.rows(c_kv, dtype, B, S, R)
    call.rows(k_pe, dtype, B, S, Dr)
    call.packed(w_kv, dtype, H, Dn + Dv, R)
    for _ in range(2):
        call.output(q_nope, B, T, H, R)
    out = call.output(q_nope, B, T, H, Dv)
    call.integers(*slots)
    return out.transpose(1, 2) if call.run("latent_bf16") else None


@dataclass(frozen=True, slots=True)
class LatentAttention(Part):
    """Attention of H heads to latents (rows, 1, S, R) and keys (rows, 1, S, Dr).

    Attributes:
        q_a: from C to the queries' own latent, and its norm; None for queries without one.
        q: from there to the heads, (Dn + Dr) each.
        kv: from C to the latent and the key, R + Dr.
        kv_norm: of the latent.
        o: from (H·Dv) to C.
        w_kv: (H, Dn + Dv, R), a head's rows of W_UK before those of W_UV.
        value_dim: Dv.
        scale: of the scores.
        neighbours: whether it is neighbours that are rotated together, or i and i + Dr/2.
    """

    number: ClassVar[int] = 5
    norm: Norm
    q_a: tuple[Matrix, Norm] | None
    q: Matrix
    kv: Matrix
    kv_norm: Norm
    o: Matrix
    w_kv: Tensor
    value_dim: int
    scale: float
    neighbours: bool

    def write(self, fields: Fields, C: int) -> None:
        """Write norms, maps and sizes."""
        H, Dn, Dr, R = sizes = self._sizes()
        Dv = self.value_dim
        fields.fit &= fields.dtype == torch.bfloat16 and all(size > 0 for size in sizes)
        fields.fit &= Dn % 2 == 0 and Dr % 2 == 0 and R % COLUMNS == 0
        fields.norm(self.norm, C)
        I = C
        if self.q_a is None:
            fields.matrix(None, 0, 0)
            fields.norm(self.norm, C)
        else:
            matrix, norm = self.q_a
            I = matrix.weight.shape[0]
            fields.matrix(matrix, I, C)
            fields.norm(norm, I)
        fields.matrix(self.q, H * (Dn + Dr), I)
        fields.matrix(self.kv, R + Dr, C)
        fields.norm(self.kv_norm, R)
        fields.matrix(self.o, C, H * Dv)
        fields.packed(self.w_kv, fields.dtype, H, Dn + Dv, R)
        fields.integers(H, Dn, Dr, Dv, R, self.neighbours)
        fields.angles.add(Dr)
        fields.real(self.scale)

    def held(self, kept: Sequence[Tensor], fields: Fields, rows: int) -> None:
        """Write where the tokens' latents and keys go."""
        _, _, Dr, R = self._sizes()
        fields.fit &= len(kept) == 2
        for buffer, D in zip(kept, (R, Dr), strict=False):
            fields.slots(buffer, rows, 1, D)

    def _sizes(self) -> tuple[int, int, int, int]:
        H, rows, R = self.w_kv.shape
        Dr = self.kv.weight.shape[0] - R
        return H, rows - self.value_dim, Dr, R
