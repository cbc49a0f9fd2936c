from itertools import pairwise

import pytest

from quintet.checkpoint import parse_size
from quintet.checkpoint.sizes import split
from quintet.errors import InputError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("10MiB", 10 * 2**20),
        ("1.5 KB", 1500),
        ("2gib", 2 * 2**30),
        ("7B", 7),
        (1, 1),
        (10**12, 10**12),
    ],
)
def test_sizes_are_decimal_or_binary_as_written(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("wrong", ["", "GB", "5", "-5GB", "5XB", "5 G B", "0GB", 0, -1, True, 5.0])
def test_a_wrong_size_is_named_with_examples(wrong: object) -> None:
    with pytest.raises(InputError, match="max_shard_size=") as caught:
        parse_size(wrong)  # type: ignore[arg-type]
    assert repr(wrong) in str(caught.value)
    assert "'10MiB'" in str(caught.value)


@pytest.mark.parametrize("most", range(1, 12))
def test_parts_keep_the_order_and_only_a_single_tensor_may_be_too_large(most: int) -> None:
    sizes = {"a": 3, "b": 0, "c": 9, "d": 1, "e": 4, "f": 4}
    parts = split(sizes, most)
    assert [name for part in parts for name in part] == list(sizes)
    for part in parts:
        assert (
            sum(sizes[name] for name in part) <= most or [n for n in part if sizes[n]] == part[:1]
        )
    for before, after in pairwise(parts):
        assert sum(sizes[name] for name in before) + sizes[after[0]] > most


def test_no_tensors_are_one_empty_part() -> None:
    assert split({}, 5) == [[]]
