"""Documents into rows: nothing is lost, nothing comes twice before everything came once."""

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.training.data.mixing import BLOCK, Fixed
from quintet.training.data.order import key, lots, permutation
from quintet.training.data.packing import DocumentPiece, Padded, Stream, Whole, Windows, best_fit

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=25).map(np.array)
contexts = st.integers(2, 50)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=25, deadline=None)


def tokens(pieces: list[DocumentPiece]) -> Counter[tuple[int, int]]:
    return Counter((p.document, at) for p in pieces for at in range(p.start, p.stop))


def all_tokens(lengths: np.ndarray, times: int = 1) -> Counter[tuple[int, int]]:
    return Counter({(d, at): times for d, n in enumerate(lengths.tolist()) for at in range(n)})


@quick
@given(lengths_of, contexts, seeds)
def test_a_stream_reads_every_token_once_in_each_pass(
    lengths: np.ndarray, context: int, seed: int
) -> None:
    total = int(lengths.sum())
    rows = Stream(lengths, context, seed)
    # As many passes as rows are long end where a row ends.
    read = [piece for number in range(total) for piece in rows.row(number)]
    assert tokens(read) == all_tokens(lengths, context)
    # And each pass for itself, but for the rows that lie in two.
    first = [piece for number in range(total // context) for piece in rows.row(number)]
    assert max(tokens(first).values(), default=1) <= 2
    assert (tokens(first) & all_tokens(lengths)).total() >= total // context * context - context


@quick
@given(lengths_of, contexts, seeds)
def test_rows_of_a_stream_are_full(lengths: np.ndarray, context: int, seed: int) -> None:
    rows = Stream(lengths, context, seed)
    for number in range(30):
        assert sum(piece.stop - piece.start for piece in rows.row(number)) == context


@quick
@given(lengths_of, contexts, seeds, st.permutations(range(12)))
def test_a_row_follows_from_its_number_alone(
    lengths: np.ndarray, context: int, seed: int, order: list[int]
) -> None:
    in_order = Stream(lengths, context, seed)
    expected = [in_order.row(number) for number in range(12)]
    shuffled = Stream(lengths, context, seed)
    for number in order:
        assert shuffled.row(number) == expected[number]


@quick
@given(lengths_of, contexts, seeds)
def test_windows_are_full_and_go_on_from_document_to_document(
    lengths: np.ndarray, context: int, seed: int
) -> None:
    if lengths.sum() < context:
        return
    rows = Windows(lengths, context, seed)
    for number in range(20):
        row = rows.row(number)
        assert sum(piece.stop - piece.start for piece in row) == context
        for one, after in pairwise(row):
            assert one.stop == lengths[one.document]
            assert (after.document, after.start) == (one.document + 1, 0)


def test_windows_begin_everywhere() -> None:
    rows = Windows(np.array([4, 3]), 3, seed=5)
    begins = Counter((row[0].document, row[0].start) for row in map(rows.row, range(1000)))
    assert len(begins) == 5
    assert min(begins.values()) > 150


@quick
@given(lengths_of, seeds)
def test_whole_documents_come_once_in_each_pass_and_fit(lengths: np.ndarray, seed: int) -> None:
    context = int(lengths.max()) + 5
    pieces = np.stack([np.arange(len(lengths)), np.zeros(len(lengths)), lengths], 1).astype(int)
    rows = Whole(pieces, context, seed)
    for turn in range(3):
        numbers = range(turn * len(rows), (turn + 1) * len(rows))
        read = [rows.row(number) for number in numbers]
        assert max(sum(piece.stop for piece in row) for row in read) <= context
        assert sorted(piece.document for row in read for piece in row) == list(range(len(lengths)))


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_a_length_goes_where_the_least_room_is_left(lengths: list[int]) -> None:
    room: list[int] = []
    expected = []
    for length in lengths:
        fitting = [r for r in room if r >= length]
        index = room.index(min(fitting)) if fitting else len(room)
        room[index : index + 1] = [(room[index] if fitting else 30) - length]
        expected.append(sorted(room))
        bins = best_fit(lengths[: len(expected)], 30)
        left = 30 - np.bincount(bins, weights=lengths[: len(expected)])
        assert sorted(left.astype(int).tolist()) == expected[-1]


@quick
@given(st.integers(1, 30), seeds)
def test_padded_rows_come_in_another_order_each_time(n: int, seed: int) -> None:
    pieces = np.stack([np.arange(n), np.zeros(n), np.ones(n)], 1).astype(int)
    rows = Padded(pieces, seed)
    turns = [[rows.row(turn * n + i)[0].document for i in range(n)] for turn in range(4)]
    assert all(sorted(turn) == list(range(n)) for turn in turns)
    assert n < 6 or len({tuple(turn) for turn in turns}) == 4


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), seeds)
@settings(max_examples=10, deadline=None)
def test_sources_are_read_by_their_weights_and_from_their_first_row_on(
    weights: list[float], seed: int
) -> None:
    dealt = Fixed(weights, seed).rows(0, 2 * BLOCK, weights)
    for source, weight in enumerate(weights):
        numbers = sorted(number for s, number in dealt if s == source)
        assert numbers == list(range(len(numbers)))
        assert abs(len(numbers) - 2 * BLOCK * weight / sum(weights)) <= 2


def test_an_order_is_the_same_for_ever() -> None:
    # The first numbers of SplitMix64 with the seed 0, as its authors' program prints them.
    assert lots(0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    # Whoever changes these changes what every training that is resumed goes on with.
    assert permutation(key(1, 2, 3), 8).tolist() == [5, 0, 7, 3, 6, 1, 4, 2]
