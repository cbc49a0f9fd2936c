"""Inputs of `quintet.triton.attention`: sequences in pages, with what nobody wrote around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton.cases import Case
from quintet.ops import paged
from quintet.ops.vector_codes import VectorCode
from quintet.triton.attention import attend_pages
from quintet.triton.pages import Coded, Pages

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Scene:
    """Sequences, and the memory they lie in.

    Attributes:
        tokens: how many each sequence has, and how many it had before.
        heads: H and K.
        sizes: of a query and key in its parts, and of a value; without, the first part is it.
        page: how many slots one has; None for rows, 0 for keys of the packed row itself.
        dtype: of all.
        bits: of what is kept; None to keep it as it is.
        window: how many slots are seen at the most.
        spare: tokens of no sequence, behind all.
        nowhere: which sequence is in no page.
        longest: how many slots a sequence has at the most; None for what they have.
    """

    tokens: Sequence[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, ...] = (16, 16)
    page: int | None = None
    dtype: torch.dtype = F32
    bits: int | None = None
    window: int | None = None
    spare: int = 0
    nowhere: int | None = None
    longest: int | None = None
    shared: bool = False

    def pages(self, device: torch.device, g: torch.Generator) -> Pages:
        """Return where the sequences are, in pages that are not beside each other."""
        new = torch.tensor([count for count, _ in self.tokens])
        before = torch.tensor([start for _, start in self.tokens])
        ends = torch.cat((torch.zeros(1, dtype=torch.long), new.cumsum(0)))
        longest = max(self.longest or 0, int((new + before).max()))
        n, table = len(new), None
        if self.page != 0:
            size = self.page or longest
            columns = -(-longest // size)
            table = torch.randperm(n * columns + 1, generator=g)[: n * columns].view(n, columns)
            # Of a table with room to spare, as pages are taken when they are needed.
            if self.nowhere is not None:
                table[self.nowhere] = -1
            table = table.int().to(device)
        ints = (x.int().to(device) for x in (before, ends))
        return Pages(table, *ints, int(new.max()), longest)

    def memory(self, size: int, heads: int, pages: Pages, g: torch.Generator) -> Tensor:
        """Return memory of so many numbers a slot; what nobody wrote is no number."""
        if pages.table is None:
            N = int(pages.ends[-1]) + self.spare
            return torch.randn(1, N, heads, size, generator=g).transpose(1, 2)
        P, page = pages.table.numel() + 1, self.page or pages.longest
        # A slot's heads beside each other, as some keep them, or a head's slots.
        made = torch.full((P, page, heads, size), torch.nan).transpose(1, 2)
        made = made.contiguous() if size % 32 else made
        for i, (count, start) in enumerate(self.tokens):
            for slot in range(count + start):
                number = int(pages.table[i, slot // page])
                if number >= 0:
                    made[number, :, slot % page] = torch.randn(heads, size, generator=g)
        return made


def inputs(device: torch.device, *, scene: Scene) -> Mapping[str, Any]:
    g = torch.Generator().manual_seed(len(scene.tokens) + sum(scene.sizes))
    pages = scene.pages(device, g)
    (H, K), *keys = scene.heads, *scene.sizes
    values = [] if scene.shared else [keys.pop()]
    N = int(pages.ends[-1]) + scene.spare
    # A slice of something wider, as a part of a projection is.
    q = [torch.randn(N, H, D + 8, generator=g)[..., :D] for D in keys]
    held = []
    for i, D in enumerate([*keys, *values]):
        heads = 1 if i == 1 and len(keys) == 2 else K
        made = scene.memory(D, heads, pages, g)
        if scene.bits is None:
            held.append(made.to(device, scene.dtype))
            continue
        code = VectorCode(scene.bits)
        codes, scales = code.encode(made.nan_to_num(7))
        held.append(Coded(codes.to(device), scales.contiguous().to(device), scene.bits))
    return {
        "q": tuple(x.to(device, scene.dtype) for x in q),
        "k": tuple(held[: len(keys)]),
        "v": held[-1] if values else None,
        "pages": pages,
        "window": scene.window,
        "scale": sum(keys) ** -0.5,
    }


def with_little_room(device: torch.device, *, scene: Scene, slots: int) -> Mapping[str, Any]:
    """Return the inputs of a scene whose rows end before some of its tokens."""
    given = inputs(device, scene=scene)
    return {**given, "k": tuple(x[:, :, :slots] for x in given["k"]), "v": given["v"][:, :, :slots]}


def case(name: str, *tokens: tuple[int, int], compiles: bool = True, **more: Any) -> Case:
    scene = Scene(tokens, **more)
    tolerance = {F32: 2e-6, BF16: 2**-7, F16: 2**-9}[scene.dtype]
    made = partial(inputs, scene=scene)
    return Case(name, attend_pages, paged.attend_pages.definition, made, tolerance, compiles)


LATENT = {"sizes": (512, 64), "shared": True}
LIKE = {"compiles": False}
CASES = [
    case("heads of 64", (1, 70), (1, 3), (1, 0), sizes=(64, 64), heads=(14, 2), dtype=BF16),
    case("one sequence, divided", (1, 300), heads=(4, 1), longest=2000, **LIKE),
    case("heads of 128 in pages", (1, 40), (1, 17), sizes=(128, 128), page=16, dtype=BF16, **LIKE),
    case("heads of 80", (1, 20), sizes=(80, 80), heads=(2, 2), dtype=BF16, **LIKE),
    case("heads of 96", (1, 20), sizes=(96, 96), heads=(2, 2), dtype=F16, **LIKE),
    case("heads of 224", (1, 40), (1, 5), sizes=(224, 224), heads=(2, 2), dtype=BF16),
    case("heads of 160", (1, 40), sizes=(160, 160), heads=(2, 2), dtype=BF16, **LIKE),
    case("drafts", (3, 40), (3, 9), window=20, dtype=BF16, sizes=(32, 32), **LIKE),
    case("prompts and steps", (37, 0), (1, 60), (5, 33), heads=(6, 2), longest=200, dtype=BF16),
    case("some of a window", (40, 30), (1, 90), (1, 0), window=16, page=8),
    case("no tokens, and nowhere", (2, 3), (0, 9), (1, 4), nowhere=2, **LIKE),
    case("nowhere in pages", (1, 9), (1, 4), nowhere=1, page=4, **LIKE),
    case("texts of one row", (33, 0), (4, 0), (20, 0), page=0, heads=(4, 4), **LIKE),
    case("texts, a window", (70, 0), (4, 0), page=0, window=9, sizes=(64, 64), dtype=BF16, **LIKE),
    case("latents, 16 heads", (1, 90), (1, 20), heads=(16, 1), dtype=BF16, **LATENT, **LIKE),
    case("latents, 128 heads", (1, 40), heads=(128, 1), longest=300, dtype=BF16, **LATENT),
    case("latents, drafts", (2, 90), (2, 5), heads=(16, 1), page=64, dtype=BF16, **LATENT),
    case("latents of 48", (1, 50), (9, 3), heads=(6, 1), sizes=(48, 8), shared=True, **LIKE),
    case("expanded", (30, 0), (9, 0), heads=(3, 3), sizes=(128, 64, 128), page=0, dtype=BF16),
    case("latents in 8 bits", (1, 60), (1, 9), heads=(16, 1), bits=8, dtype=BF16, **LATENT),
    case("keys in 8 bits", (1, 60), (4, 9), bits=8, sizes=(64, 64), dtype=BF16, **LIKE),
    case("keys in 6 bits", (1, 60), (4, 9), bits=6, sizes=(64, 64), page=16, dtype=BF16),
    case("keys in 4 bits", (1, 60), (4, 9), bits=4, sizes=(80, 80)),
    Case(
        "a row that has no room left",
        attend_pages,
        paged.attend_pages.definition,
        partial(with_little_room, scene=Scene([(1, 40), (2, 9)]), slots=33),
        2e-6,
        compiles=False,
    ),
]
