"""Compares the fields that Python writes with those that C++ reads.

Both sides list the fields of a part: Python where it writes them (`parts.py`), C++ where it
declares them (csrc/parts/). The library says how they lie (csrc/layout.cpp), and a part of each
kind is written and held against that before anything runs. Kinds of fields are compared one by
one, numbers of a part's own by their names.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels import parts
from quintet.kernels.latent import LatentAttention
from quintet.kernels.matrix import Matrix
from quintet.kernels.native import native
from quintet.kernels.parts import Adapted, Fields, Norm, Part
from quintet.kernels.patience import log
from quintet.kernels.routing import Rules

BF16 = torch.bfloat16
C, EPS, SCALE = 32, 0.125, 0.75


class Sample(NamedTuple):
    """A part with sample values, and its fields by C++ name."""

    part: Part
    kept: tuple[Tensor, ...]
    numbers: Mapping[str, float]


def agrees() -> bool:
    """Return whether library and Python agree; checked once, failures are logged."""
    library = native().library
    return library is not None and _agrees(library)


@cache
def _agrees(library: ctypes.CDLL) -> bool:
    described = library.quintet_layout
    described.restype = ctypes.c_char_p
    differs = disagreement(described().decode("ascii"))
    if differs is not None:
        log.warning(
            "layers are called one by one, as %s reads otherwise than is written (%s); "
            "install quintet anew",
            library._name,
            differs,
        )
    return differs is None


def disagreement(described: str) -> str | None:
    """Describe the first difference, or return None."""
    tables = {}
    for line in described.splitlines():
        number, kind, *slots = line.split()
        tables[int(number), kind] = slots
    samples = _samples()
    if {number for number, _ in tables} != {sample.part.number for sample in samples}:
        return "the library has other kinds of parts"
    for sample in samples:
        fields, held = Fields(BF16), Fields(BF16)
        sample.part.write(fields, C)
        sample.part.held(sample.kept, held, 2)
        for kind, written in (("fields", fields), ("held", held)):
            slots = tables.get((sample.part.number, kind), [])
            wrong = _difference(written, slots, sample.numbers)
            if wrong is not None:
                return f"{type(sample.part).__name__}, {kind}: {wrong}"
    return None


def _difference(written: Fields, slots: Sequence[str], numbers: Mapping[str, float]) -> str | None:
    if not written.fit:
        return "the sample does not fit"
    if len(written.fields) != len(slots):
        return f"{len(written.fields)} fields are written and {len(slots)} are read"
    addresses = {tensor.data_ptr() for tensor in written.tensors}
    lies = False
    for value, slot in zip(written.fields, slots, strict=True):
        name, _, kind = slot.rpartition(":")
        if kind == "p":
            lies = value in addresses
            right = lies or value == 0
        elif kind == "b":
            right = value > 0 if lies else value == 0
        elif kind == "d":
            (real,) = struct.unpack("d", struct.pack("q", value))
            right = real == numbers.get(name, EPS)
        else:
            right = 0 <= value < 2**31 and value == numbers.get(name, value)
        if not right:
            return f"{value} is written where {name} is read"
    return None


def _samples() -> list[Sample]:
    def numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    def matrix(O: int, I: int, *, bias: bool = True) -> Matrix:
        weight = numbers(O, I, dtype=torch.int8)
        return Matrix(weight, numbers(O, dtype=torch.float32), numbers(O) if bias else None)

    def stack(E: int, O: int, I: int) -> Matrix:
        return Matrix(numbers(E, O, I, dtype=torch.int8), numbers(E, O, dtype=torch.float32))

    def norm(width: int = C) -> Norm:
        return Norm(numbers(width), EPS)

    def adapted(O: int, I: int) -> Adapted:
        return Adapted(matrix(O, I), matrix(3, I), matrix(O, 3))

    def gated(F: int) -> tuple[Matrix, Matrix, Matrix]:
        return matrix(F, C, bias=False), matrix(F, C, bias=False), matrix(C, F, bias=False)

    D, K, H, R = 16, 2, 6, 32
    qkv = adapted(H * D, C), adapted(K * D, C), adapted(K * D, C)
    attention = parts.Attention(norm(), qkv, matrix(C, H * D), D, 5, SCALE, beside=True)
    P, G, N, W, heads = 16, 1, 48, 3, 4
    channels = heads * P + 2 * G * N
    scalars = tuple(numbers(heads, dtype=torch.float32) for _ in range(3))
    mixer = parts.Mixer(
        norm(),
        matrix(heads * P + channels + heads, C),
        matrix(C, heads * P),
        numbers(channels, W),
        numbers(channels),
        scalars,  # type: ignore[arg-type]
        norm(heads * P),
        G,
        (0.25, 1.75),
    )
    state = numbers(2, heads, P, N, dtype=torch.float32)
    record = numbers(7, heads * P + channels + heads)
    rules = Rules(sigmoid=True, active=2, groups=4, kept_groups=3, ranked=1, scaling=SCALE)
    experts = stack(8, 24, C), stack(8, 24, C), stack(8, C, 24)
    router, bias = numbers(8, C), numbers(8, dtype=torch.float32)
    routed = parts.Routed(norm(), router, True, rules, bias, experts, gated(40), numbers(1, C))
    Dn, Dr, Dv, heads_of = 10, 8, 12, 3
    latent = LatentAttention(
        norm(),
        (matrix(20, C), norm(20)),
        matrix(heads_of * (Dn + Dr), 20),
        matrix(R + Dr, C),
        norm(R),
        matrix(C, heads_of * Dv),
        numbers(heads_of, Dn + Dv, R),
        Dv,
        SCALE,
        True,
    )
    return [
        Sample(
            attention,
            (numbers(2, K, 9, D), numbers(2, K, 9, D)),
            {"H": H, "K": K, "D": D, "window": 5, "rotates": 1, "beside": 1, "scale": SCALE},
        ),
        Sample(parts.MLP(norm(), *gated(40)), (), {"F": 40}),
        Sample(
            mixer,
            (numbers(2, W - 1, channels), state, record),
            {"H": heads, "P": P, "G": G, "N": N, "W": W, "least": 0.25, "most": 1.75},
        ),
        Sample(parts.SharedMLP(norm(), adapted(80, C), matrix(C, 40), matrix(C, C)), (), {}),
        Sample(
            routed,
            (),
            {
                "wide": 1,
                "rules.scoring": 1,
                "rules.E": 8,
                "rules.A": 2,
                "rules.groups": 4,
                "rules.kept": 3,
                "rules.ranked": 1,
                "rules.normalise": 0,
                "rules.scaling": SCALE,
                "experts.E": 8,
                "experts.C": C,
                "experts.F": 24,
                "F": 40,
            },
        ),
        Sample(
            latent,
            (numbers(2, 1, 9, R), numbers(2, 1, 9, Dr)),
            {"H": 3, "Dn": Dn, "Dr": Dr, "Dv": Dv, "R": R, "neighbours": 1, "scale": SCALE},
        ),
        Sample(parts.FinalNorm(norm()), (), {}),
    ]
