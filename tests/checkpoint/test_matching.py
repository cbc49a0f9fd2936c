from pathlib import Path

import pytest
import torch

from quintet.checkpoint import Mismatch, TensorInfo, compare
from quintet.errors import CheckpointError


def found(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, torch.float32, s, Path("f")) for name, s in shapes.items()}


def test_names_and_shapes_are_told_apart() -> None:
    difference = compare({"a": (1,), "b": (2, 3), "c": ()}, found(b=(3, 2), c=(), d=(9,)))
    assert difference.missing == ["a"]
    assert difference.unexpected == ["d"]
    assert difference.mismatched == [Mismatch("b", (2, 3), (3, 2))]


def test_an_error_lists_every_kind_with_shapes_and_says_what_to_check() -> None:
    difference = compare({"a": (1,), "b": (2, 3)}, found(b=(3, 2), d=(9,)))
    with pytest.raises(CheckpointError) as caught:
        difference.raise_if_incomplete("some/model")
    message = str(caught.value)
    assert message.startswith("some/model does not fit the model\n")
    assert "1 missing:\n  a: expected [1]" in message
    assert "1 of another shape:\n  b: expected [2, 3], found [3, 2]" in message
    assert "1 that the model does not use:\n  d: found [9]" in message
    assert "config.json" in message


def test_a_long_list_is_cut_at_ten_with_the_count() -> None:
    difference = compare({f"w{i:02}": (i,) for i in range(25)}, {})
    with pytest.raises(CheckpointError) as caught:
        difference.raise_if_incomplete("x")
    message = str(caught.value)
    assert "25 missing" in message
    assert "w09" in message
    assert "w10" not in message
    assert "and 15 more" in message


def test_unexpected_tensors_alone_are_no_error() -> None:
    compare({"a": (1,)}, found(a=(1,), b=(2,))).raise_if_incomplete("x")
