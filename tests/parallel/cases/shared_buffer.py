"""Cases of sums in shared memory; messages are the definition."""

import os
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.cases.generate import chooses, raised
from quintet.errors import RankFailedError
from quintet.kernels.shared_buffer import SLOT, SharedBuffer
from quintet.parallel.shared_buffer import FOLDER, join, shared_buffer_of, sum_in_place

KINDS = torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.float16


def there() -> SharedBuffer:
    group = dist.group.WORLD
    assert group is not None
    shared_buffer = shared_buffer_of(group)
    assert shared_buffer is not None, "this machine has memory to share, and kernels"
    assert shared_buffer_of(group) is shared_buffer
    return shared_buffer


def numbers(dtype: torch.dtype, count: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(100 + dist.get_rank())
    return (torch.randn(count, generator=drawn) * 1000).to(dtype)


def sums() -> None:
    """Sums of all kinds and sizes are those of messages, and the same bits in all."""
    there()
    group = dist.group.WORLD
    assert group is not None
    sizes = list(product(KINDS, (0, 1, 15, 16, 17, 1000)))
    # What does not fit into a slot goes through it in pieces.
    sizes += [(torch.bfloat16, SLOT // 2), (torch.float32, SLOT // 4 + 3), (torch.int64, SLOT // 4)]
    for dtype, count in sizes:
        own = numbers(dtype, count)
        wanted, made = own.clone(), own.clone()
        dist.all_reduce(wanted)
        sum_in_place(made, group)
        # Messages round after each of several; in float32, the order may differ.
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance * 1000)
        if dist.get_world_size() == 2:
            assert torch.equal(made, wanted), (dtype, count)
        of_all = join(made, group)
        assert all(torch.equal(one, made) for one in of_all), (dtype, count)


def not_numbers() -> None:
    """What is not a number in one process is none in the sum."""
    group = dist.group.WORLD
    assert group is not None
    for dtype in KINDS[:3]:
        x = torch.ones(40, dtype=dtype)
        if chooses():
            x[3], x[17], x[39] = torch.nan, torch.inf, -torch.inf
        sum_in_place(x, group)
        assert x[3].isnan()
        assert x[17] == torch.inf
        assert x[39] == -torch.inf
        assert x.isfinite().sum() == 37


def joins() -> None:
    """What all have stands one behind the other."""
    group = dist.group.WORLD
    assert group is not None
    for dtype, shape in product(
        (torch.bfloat16, torch.float16, torch.bool), ((3, 5), (0,), (700, 999))
    ):
        own = torch.full(shape, dist.get_rank() + 1).to(dtype)
        made = join(own, group)
        assert made.shape == (dist.get_world_size(), *shape)
        for rank, part in enumerate(made):
            assert torch.equal(part, torch.full(shape, rank + 1).to(dtype))


def many() -> None:
    """However the processes hurry and wait, each sum is that of one call."""
    shared_buffer = there()
    rank, size = dist.get_rank(), dist.get_world_size()
    for call in range(1000):
        if call % 300 == 100 * rank:
            time.sleep(0.002)
        x = torch.full((call % 40 + 1,), float(call + rank))
        assert shared_buffer.sum(x)
        assert x.tolist() == [size * call + size * (size - 1) / 2.0] * len(x)


def has_no_name() -> None:
    """The memory is that of a file which nobody finds, and which ends with the processes."""
    there()
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if f"{FOLDER}/quintet-shared" in line]
    assert mapped
    assert all(line.endswith("(deleted)") for line in mapped)


def none_comes() -> None:
    """Who waits in vain is told who did not come, and why."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    # Messages have all the time there is; only who adds up is not waited for.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quintet.parallel.shared_buffer._patience", lambda group: 0.3)
        shared_buffer_of(group)
    last = dist.get_world_size() - 1
    x = torch.ones(4)
    if dist.get_rank() != last:
        say = raised(lambda: sum_in_place(x, group), RankFailedError)
        assert f"rank {last} did not come" in say
        # And no later sum is taken for this one.
        raised(lambda: sum_in_place(x, group), RankFailedError)
    dist.barrier()


def dies() -> None:
    """A process that is killed is noticed at once, whatever the time there is."""
    there()
    group = dist.group.WORLD
    assert group is not None
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        os._exit(9)
    say = raised(lambda: sum_in_place(torch.ones(4), group), RankFailedError)
    assert f"rank {last} has ended" in say
