"""Reading memory: every number is read, whatever the length."""

import pytest
import torch

from quintet.kernels.bandwidth import read


@pytest.mark.parametrize("count", [0, 1, 63, 128, 1000, 100_003])
@pytest.mark.usefixtures("level")
def test_every_number_is_read_once(count: int) -> None:
    numbers = torch.arange(count, dtype=torch.float32).remainder(17) + 1
    total = read(numbers)
    assert total is not None
    assert total.item() == numbers.to(torch.float64).sum().item()


@pytest.mark.usefixtures("level")
def test_other_tensors_are_left_to_torch() -> None:
    assert read(torch.ones(8, dtype=torch.float64)) is None
    assert read(torch.ones(8, 2)) is None
    assert read(torch.ones(16)[::2]) is None


def test_without_kernels_nothing_is_read(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("QUINTET_KERNELS", "0")
    assert read(torch.ones(8)) is None
