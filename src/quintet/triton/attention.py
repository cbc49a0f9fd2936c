"""Attention over pages: whether kernels take it, and how it is divided among programs.

Latents are keys of one head that are values too: a tile of them is read once for both.
"""

import math

import torch
from torch import Tensor

from quintet.triton.attention_kernels import attend, join
from quintet.triton.launching import cdiv, launch, power_of_two, takes
from quintet.triton.pages import Coded, Memory, Pages

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What a vector may have, in one part: the sum over values is held in registers.
LONGEST = 512
# Shared memory that the keys and values of one step take; two steps are there at a time, and with
# the queries that fits the 163 KB of an A100.
STEP_BYTES = 40 * 1024
# Programs a multiprocessor should have, for one to compute while another waits for memory.
RESIDENT = 2
# Of a GPU of these years, where none is asked.
PROCESSORS = 132
MOST_SPLITS = 64


def attend_pages(
    q: tuple[Tensor, ...],
    k: tuple[Memory, ...],
    v: Memory | None,
    pages: Pages,
    *,
    window: int | None,
    scale: float,
) -> Tensor | None:
    """Compute `ops.paged.attend_pages`, (N, H, Dv)."""
    memory = [*k] if v is None else [*k, v]
    tensors = [*q, *(x for one in memory for x in _tensors(one)), pages.starts, pages.ends]
    tensors += [] if pages.table is None else [pages.table]
    if not _fits(q, memory, pages) or not takes(*tensors):
        return None
    N, H, D = q[0].shape
    keys = [_codes(x) for x in k]
    values = keys[0] if v is None else _codes(v)
    K, page, n = keys[0].shape[1], keys[0].shape[2], len(pages.starts)
    G, Dv, D2 = H // K, D if v is None else _size(v), q[1].shape[2] if len(q) > 1 else 0
    blocks = [power_of_two(max(x, 16)) if x else 0 for x in (D, D2, Dv)]
    M, S, warps = _tile(pages.most * G, blocks, v is None, q[0].itemsize)
    # Where all have as many tokens, no program has to look for its sequence.
    tiles_of_each = cdiv(pages.most * G, M) if n * pages.most == N else 0
    tiles = n * tiles_of_each if tiles_of_each else N * G // M + n
    splits = _splits(tiles * K, pages, window, S, q[0].device)
    shape = (N, H, Dv) if splits == 1 else (splits, N, H, Dv)
    output = q[0].new_empty(shape, dtype=None if splits == 1 else torch.float32)
    sums = None if splits == 1 else output.new_empty(shape[:-1])
    q2, k2 = (q[1], keys[1]) if len(q) > 1 else (None, None)
    scales = [x.scales if isinstance(x, Coded) else None for x in (k[0], k[-1], v)]
    launch(
        attend,
        (tiles, K, splits),
        q[0],
        q2,
        keys[0],
        k2,
        None if v is None else values,
        *scales,
        pages.table,
        pages.starts,
        pages.ends,
        output,
        sums,
        scale / math.log(2),
        n,
        N,
        page,
        0 if pages.table is None else pages.table.shape[1] * page,
        0 if pages.table is None else pages.table.stride(0),
        *_steps(q[0]),
        *_steps(q2),
        *_places(keys[0], K),
        *_places(k2, K),
        *_places(values, K),
        K=K,
        G=G,
        D=D,
        D_BLOCK=blocks[0],
        D2=D2,
        D2_BLOCK=blocks[1],
        DV=Dv,
        DV_BLOCK=blocks[2],
        M=M,
        S=S,
        EACH=tiles_of_each,
        SPLITS=splits,
        WINDOW=window or 0,
        # One page of a sequence is looked up once.
        PAGED=pages.table is not None and pages.table.shape[1] > 1,
        BITS=k[0].bits if isinstance(k[0], Coded) else 0,
        num_warps=warps,
        num_stages=2,
    )
    if sums is None:
        return output
    joined = q[0].new_empty(N, H, Dv)
    launch(
        join,
        (N * H,),
        output,
        sums,
        joined,
        N * H,
        DV=Dv,
        DV_BLOCK=blocks[2],
        SPLITS=splits,
        num_warps=1 if Dv <= 128 else 4,
    )
    return joined


def _fits(q: tuple[Tensor, ...], memory: list[Memory], pages: Pages) -> bool:
    """Return whether shapes, steps and dtypes suit the kernel."""
    parts, dtype = len(q), q[0].dtype
    keys = memory[:parts]
    if not 1 <= parts <= 2 or dtype not in FLOATS or any(x.ndim != 3 for x in q):
        return False
    N, H, _ = q[0].shape
    P, K, page, _ = _codes(memory[0]).shape
    n, integers = len(pages.starts), (pages.starts, pages.ends)
    return (
        bool(N and n and K and page and H % K == 0 and pages.most > 0)
        and all(x.dtype == torch.int32 and x.is_contiguous() for x in integers)
        and pages.ends.shape == (n + 1,)
        and (
            P == 1
            if pages.table is None
            else pages.table.dtype == torch.int32
            and pages.table.ndim == 2
            and len(pages.table) == n
            and pages.table.stride(1) == 1
        )
        and all(x.dtype == dtype and x.shape[:2] == (N, H) and x.stride(2) == 1 for x in q)
        and all(_size(k) == x.shape[2] for k, x in zip(keys, q, strict=True))
        and all(_codes(x).shape[:3] in ((P, K, page), (P, 1, page)) for x in keys[1:])
        and all(_codes(x).shape[:3] == (P, K, page) for x in memory[parts:])
        and all(0 < _size(x) <= LONGEST for x in memory)
        and len({type(x) for x in memory}) == 1
        and all(_holds(x, dtype) for x in memory)
    )


def _holds(memory: Memory, dtype: torch.dtype) -> bool:
    if isinstance(memory, Coded):
        first = memory.codes.stride(3) == 1 and memory.codes.dtype == torch.uint8
        # A scale of each head of keys is found without steps of its own.
        return first and memory.scales.is_contiguous() and memory.scales.dtype == torch.bfloat16
    return memory.dtype == dtype and memory.stride(3) == 1


def _tensors(memory: Memory) -> tuple[Tensor, ...]:
    return (memory.codes, memory.scales) if isinstance(memory, Coded) else (memory,)


def _codes(memory: Memory) -> Tensor:
    return memory.codes if isinstance(memory, Coded) else memory


def _size(memory: Memory) -> int:
    if isinstance(memory, Coded):
        return memory.codes.shape[3] * 8 // memory.bits
    return memory.shape[3]


def _steps(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _places(x: Tensor | None, K: int) -> tuple[int, int, int]:
    """Return the steps of pages, heads and slots; heads that share a part have none."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), x.stride(1) if x.shape[1] == K else 0, x.stride(2)


def _tile(rows: int, blocks: list[int], shared: bool, itemsize: int) -> tuple[int, int, int]:
    """Return the rows of a program, the keys of a step, and the warps."""
    widest = max(blocks)
    # The scores and the sum over values of so many rows are held in registers.
    most = 32 if itemsize > 2 else 128 if widest <= 128 else 64
    M = min(power_of_two(max(rows, 16)), most)
    width = (sum(blocks[:2]) + (0 if shared else blocks[2])) * itemsize
    S = min(max(power_of_two(STEP_BYTES // width + 1) // 2, 16), 64)
    return M, S, 8 if M * widest >= 64 * 128 else 4


def _splits(programs: int, pages: Pages, window: int | None, S: int, device: torch.device) -> int:
    """Return the number of programs that divide the keys of one text."""
    if device.type == "cuda":
        resident = RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        resident = RESIDENT * PROCESSORS
    reach = pages.longest if window is None else min(pages.longest, window + pages.most)
    # Fewer than a few steps each would be more joining than attending.
    return max(1, min(resident // programs, cdiv(reach, 4 * S), MOST_SPLITS))
