"""The short causal convolution against torch's, and the window that continues it."""

import pytest
import torch

from quintet.ops.conv import causal_conv, continued, last_window


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (3, 4), (9, 4), (5, 1), (6, 2)])
def test_equals_torchs_depthwise_convolution(T: int, W: int, bias: bool) -> None:
    x, weight = torch.randn(2, T, 6).double(), torch.randn(6, W).double()
    b = torch.randn(6).double() if bias else None
    expected = torch.nn.functional.conv1d(
        x.transpose(1, 2), weight[:, None], b, padding=W - 1, groups=6
    )[:, :, :T].transpose(1, 2)
    torch.testing.assert_close(causal_conv(continued(x, None, W), weight, b), expected)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    x, weight, bias = (torch.randn(*s).bfloat16() for s in ((2, 9, 6), (6, 4), (6,)))
    exact = causal_conv(continued(x.float(), None, 4), weight.float(), bias.float())
    assert torch.equal(causal_conv(continued(x, None, 4), weight, bias), exact.bfloat16())


def test_a_text_in_parts_equals_the_text_as_one() -> None:
    x, weight, bias = torch.randn(2, 12, 6), torch.randn(6, 4), torch.randn(6)
    whole = causal_conv(continued(x, None, 4), weight, bias)
    window, parts = None, []
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 11), (11, 12)):
        raw = continued(x[:, start:stop], window, 4)
        parts.append(causal_conv(raw, weight, bias))
        window = last_window(raw, 4, None)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_padding_behind_a_row_does_not_reach_its_window() -> None:
    x = torch.randn(4, 7, 6)
    before = torch.randn(4, 3, 6)
    counts = torch.tensor([0, 2, 5, 7])
    windows = last_window(continued(x, before, 4), 4, counts)
    for row, count in enumerate(counts.tolist()):
        alone = continued(x[row : row + 1, :count], before[row : row + 1], 4)
        assert torch.equal(windows[row : row + 1], last_window(alone, 4, None))
        assert torch.equal(last_window(continued(x, before, 4), 4, count)[row], windows[row])
