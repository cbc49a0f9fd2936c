"""Weights in large pages hold what they held, and what is a view of a file stays one."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quintet import AutoModelForCausalLM
from quintet.kernels import large_pages
from quintet.kernels.large_pages import PAGE, hold_in_large_pages
from waiting import PATIENCE

ranges = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40))).map(
    lambda pairs: [
        (start, start + length)
        for at, (gap, length) in enumerate(pairs)
        for start in [sum(g + n for g, n in pairs[:at]) + gap]
    ]
)


def covered(found: list[tuple[int, int]]) -> set[int]:
    return {place for start, end in found for place in range(start, end)}


def covers(found: list[tuple[int, int]], these: list[tuple[int, int]]) -> bool:
    """Tell whether these lie in what was found, of which one range may begin where another ends."""
    whole: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if whole and whole[-1][1] == start:
            start = whole.pop()[0]
        whole.append((start, end))
    return all(any(a <= start and end <= b for a, b in whole) for start, end in these)


@given(ranges, ranges)
def test_what_is_common_is_in_both(
    these: list[tuple[int, int]], those: list[tuple[int, int]]
) -> None:
    found = list(large_pages._common(these, those))
    assert covered(found) == covered(these) & covered(those)


@given(ranges)
def test_ranges_are_joined_where_little_is_between(these: list[tuple[int, int]]) -> None:
    far = [(start << 16, end << 16) for start, end in these]
    found = list(large_pages._joined(far))
    assert covered(these) <= covered([(start >> 16, end >> 16) for start, end in found])
    ends = [end for _, end in found[:-1]]
    starts = [start for start, _ in found[1:]]
    assert all(s > e + large_pages.GAP for e, s in zip(ends, starts, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are Linux's")
def test_numbers_stay_and_files_are_left_alone(tmp_path: Path) -> None:
    own = [torch.randn(1 << 20) for _ in range(6)]
    wanted = [x.clone() for x in own]
    path = tmp_path / "weights"
    path.write_bytes(bytes(16 << 20))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    view = torch.frombuffer(mapped, dtype=torch.uint8)
    ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (*own, view)]
    anonymous = list(large_pages._common(sorted(ranges), large_pages._anonymous()))
    assert covers(anonymous, ranges[:-1])
    assert not covers(anonymous, ranges[-1:])
    assert large_pages._move(anonymous) % PAGE == 0
    moving = hold_in_large_pages([*own, view])
    if moving is not None:
        moving.join(PATIENCE)
    assert all(map(torch.equal, own, wanted))


def test_few_weights_stay_where_they_are() -> None:
    assert hold_in_large_pages([torch.zeros(1000)]) is None


def test_nothing_is_moved_where_large_pages_are_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(large_pages, "SETTING", setting)
    assert hold_in_large_pages([torch.zeros(8 << 20)]) is None


def test_all_weights_of_a_loaded_model_are_offered(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[torch.Tensor] = []
    monkeypatch.setattr("quintet.modeling.loading.hold_in_large_pages", offered.extend)
    model = AutoModelForCausalLM.from_pretrained(chat_model, quantize="int8")
    assert {x.data_ptr() for x in model.state_dict().values()} <= {x.data_ptr() for x in offered}
