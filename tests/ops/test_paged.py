"""What is kept in pages is attended to as what is kept in a cache."""

import pytest
import torch
from torch import Tensor

from quintet.ops.attention import eager
from quintet.ops.masks import attention_mask_of
from quintet.ops.paged import attend_pages
from quintet.triton.pages import Pages

COUNTS, STARTS, PAGE = [3, 1, 4], [5, 0, 2], 4
G = torch.Generator().manual_seed(0)
N, S = sum(COUNTS), max(a + b for a, b in zip(COUNTS, STARTS, strict=True))


def pages(table: Tensor | None = None) -> Pages:
    ends = torch.tensor([0, *COUNTS]).cumsum(0).int()
    return Pages(table, torch.tensor(STARTS).int(), ends, max(COUNTS), S)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


def rows_of(where: Pages, memory: Tensor) -> list[Tensor]:
    """Return (K, S, D) of each sequence, read slot by slot."""
    assert where.table is not None
    size = memory.shape[2]
    return [
        torch.stack([memory[row[s // size], :, s % size] for s in range(S)], dim=1)
        for row in where.table.tolist()
    ]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("table", [[[2], [0], [3]], [[4, 1], [0, -5], [2, 5]]])
def test_a_token_sees_what_its_sequence_has_kept(
    window: int | None, table: list[list[int]]
) -> None:
    where = pages(torch.tensor(table).int())
    size = S if len(table[0]) == 1 else PAGE
    keys, values, q = random(6, 2, size, 4), random(6, 2, size, 6), random(N, 6, 4)
    made = attend_pages((q,), (keys,), values, where, window=window, scale=0.7)
    kept = zip(*(rows_of(where, x) for x in (keys, values)), strict=True)
    token = 0
    for count, start, (k, v) in zip(COUNTS, STARTS, kept, strict=True):
        mask = attention_mask_of(torch.arange(start, start + count)[None], start, S, window)
        own = q[None, token : token + count].transpose(1, 2)
        out, _ = eager(own, k[None], v[None], mask, scale=0.7, dropout=0.0)
        torch.testing.assert_close(
            made[token : token + count], out[0].transpose(0, 1), rtol=1e-6, atol=1e-6
        )
        token += count


def test_keys_in_two_parts_are_as_if_joined_and_values_may_be_one_of_them() -> None:
    where = pages(torch.tensor([[1], [0], [2]]).int())
    q, more = random(N, 4, 6), random(N, 4, 2)
    latents, shared = random(3, 1, S, 6), random(3, 1, S, 2)
    made = attend_pages((q, more), (latents, shared), None, where, window=None, scale=0.5)
    joined = (torch.cat((q, more), dim=-1),), (torch.cat((latents, shared), dim=-1),)
    right = attend_pages(*joined, latents, where, window=None, scale=0.5)
    torch.testing.assert_close(made, right)


def test_nowhere_is_not_seen_and_what_nobody_wrote_does_no_harm() -> None:
    where = pages(torch.tensor([[1], [-1], [0]]).int())
    q, keys = random(N, 2, 4), random(2, 2, S, 4)
    made = attend_pages((q,), (keys,), keys, where, window=None, scale=1.0)
    assert not made[3].any()
    for row, held in ((1, 8), (0, 6)):
        keys[row, :, held:] = torch.nan
    assert torch.equal(attend_pages((q,), (keys,), keys, where, window=None, scale=1.0), made)


def test_what_comes_behind_the_last_page_is_nowhere() -> None:
    q, keys = random(N, 2, 4), random(3, 2, PAGE, 4)
    table = torch.tensor([[1], [0], [2]]).int()
    longer = torch.cat((table, torch.full_like(table, -1)), dim=1)
    made, right = (
        attend_pages((q,), (keys,), keys, pages(one), window=None, scale=1.0)
        for one in (table, longer)
    )
    assert torch.equal(made, right)


def test_no_length_is_read() -> None:
    where = pages(torch.tensor([[1], [2], [0]]).int())
    assert where.table is not None
    # Whoever reads a number of these fails.
    told = (x.to("meta") for x in (where.table, where.starts, where.ends))
    where = Pages(*told, where.most, where.longest)
    q, keys = (x.to("meta") for x in (random(N, 1, 4), random(3, 1, S, 4)))
    made = attend_pages((q,), (keys,), keys, where, window=2, scale=1.0)
    assert made.shape == (N, 1, 4)
    with pytest.raises(RuntimeError):
        where.starts.tolist()
