"""What was read is found again: against a plain list of all texts."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.serving.prefix import PrefixCache


@dataclass(frozen=True)
class Copy:
    """What a row held of tokens: the tokens themselves, and perhaps a state behind them."""

    start: int
    ids: tuple[int, ...]
    resumable: bool

    @property
    def nbytes(self) -> int:
        return len(self.ids) + (0 if self.divisible else 10 * self.resumable)

    divisible: bool = True

    def without_states(self) -> "Copy":
        return Copy(self.start, self.ids, self.divisible, self.divisible)

    def split(self, at: int) -> "tuple[Copy, Copy]":
        n = at - self.start
        assert 0 < n < len(self.ids)
        head = Copy(self.start, self.ids[:n], self.divisible, self.divisible)
        return head, Copy(at, self.ids[n:], self.resumable, self.divisible)


def row_of(ids: list[int], divisible: bool):
    """Return what copies tokens of a row, which is at the end of its text."""

    def extract(start: int, stop: int) -> Copy:
        assert 0 <= start < stop <= len(ids)
        return Copy(start, tuple(ids[start:stop]), divisible or stop == len(ids), divisible)

    return extract


# Few tokens, so that many texts begin alike.
TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=12)


@given(TEXTS, st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 4))
@settings(deadline=None)
def test_the_longest_beginning_is_found(
    texts: list[list[int]], asked: list[int], grid: int
) -> None:
    cache: PrefixCache[Copy] = PrefixCache(10**6, divisible=True, grid=grid)
    for text in texts:
        cache.keep("", text, row_of(text, True))
    contents, length, _ = cache.match("", asked)
    longest = max(
        next(
            (n for n, (a, b) in enumerate(zip(text, asked, strict=False)) if a != b),
            min(len(text), len(asked)),
        )
        for text in texts
    )
    longest = min(longest, len(asked) - 1)
    assert length == longest - longest % grid
    assert [token for one in contents for token in one.ids] == asked[:length]
    assert [one.start for one in contents] == [
        sum(len(one.ids) for one in contents[:n]) for n in range(len(contents))
    ]
    # Nothing is held twice.
    distinct = {tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)}
    assert cache.nbytes == len(distinct)


@given(TEXTS, st.lists(st.integers(0, 1), min_size=1, max_size=14))
@settings(deadline=None)
def test_states_are_gone_on_from_where_they_were_kept(
    texts: list[list[int]], asked: list[int]
) -> None:
    cache: PrefixCache[Copy] = PrefixCache(10**6, divisible=False)
    for text in texts:
        cache.keep("", text, row_of(text, False))
    contents, length, _ = cache.match("", asked)
    whole = [len(text) for text in texts if len(text) < len(asked) and asked[: len(text)] == text]
    assert length == max(whole, default=0)
    assert [token for one in contents for token in one.ids] == asked[:length]
    assert not contents or contents[-1].resumable


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=9))),
    st.integers(1, 30),
)
@settings(deadline=None)
def test_it_is_never_larger_than_it_may_be(texts: list[tuple[str, list[int]]], limit: int) -> None:
    cache: PrefixCache[Copy] = PrefixCache(limit, divisible=True, grid=1)
    for scope, text in texts:
        cache.keep(scope, text, row_of(text, True))
        assert cache.nbytes <= limit
        contents, length, _ = cache.match(scope, [*text, 9])
        assert length in (0, len(text)) or length < len(text)
        assert [token for one in contents for token in one.ids] == text[:length]


def test_what_was_used_last_stays() -> None:
    cache: PrefixCache[Copy] = PrefixCache(12, divisible=True, grid=1)
    for text in ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]):
        cache.keep("", text, row_of(text, True))
    assert cache.match("", [1, 1, 1, 1, 0])[1] == 4
    cache.keep("", [4, 4, 4, 4], row_of([4, 4, 4, 4], True))
    found = [cache.match("", [n] * 5)[1] for n in (1, 2, 3, 4)]
    assert found == [4, 0, 4, 4]


def test_scopes_do_not_see_each_other_and_the_larger_loses_first() -> None:
    cache: PrefixCache[Copy] = PrefixCache(10, divisible=True, grid=1)
    cache.keep("small", [1, 2], row_of([1, 2], True))
    for n in range(3, 8):
        cache.keep("large", [n] * 4, row_of([n] * 4, True))
    assert cache.match("small", [1, 2, 3])[1] == 2
    assert cache.match("large", [1, 2, 3])[1] == 0
    cache.clear("small")
    assert cache.match("small", [1, 2, 3])[1] == 0
    cache.clear()
    assert cache.nbytes == 0


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=9))),
    st.integers(5, 60),
)
@settings(deadline=None)
def test_states_go_before_the_tokens_that_others_need(
    texts: list[tuple[str, list[int]]], limit: int
) -> None:
    cache: PrefixCache[Copy] = PrefixCache(limit, divisible=False)
    for scope, text in texts:
        cache.keep(scope, text, row_of(text, False))
        assert cache.nbytes <= limit
        contents, length, found = cache.match(scope, [*text, 9])
        # What is there ends in something to go on from: all else would be of no use.
        assert found in (0, length) or found < len(text)
        assert [token for one in contents for token in one.ids] == text[:length]
        assert not contents or contents[-1].resumable


def test_a_state_within_a_text_is_given_up_for_one_that_was_used() -> None:
    cache: PrefixCache[Copy] = PrefixCache(34, divisible=False)
    cache.keep("", [1, 1], row_of([1, 1], False))
    cache.keep("", [1, 1, 2, 2], row_of([1, 1, 2, 2], False))
    assert cache.match("", [1, 1, 2, 2, 5])[1:] == (4, 4)
    cache.keep("", [3, 3, 3], row_of([3, 3, 3], False))
    # The tokens are there, which the longer text needs, and its state is not.
    assert cache.match("", [1, 1, 9])[1:] == (0, 2)
    assert cache.match("", [1, 1, 2, 2, 5])[1:] == (4, 4)
    assert cache.evicted == 1


def test_what_an_adapter_made_is_apart() -> None:
    cache: PrefixCache[Copy] = PrefixCache(100, divisible=True, grid=1)
    cache.keep("", [1, 2, 3], row_of([1, 2, 3], True), "one")
    assert [cache.match("", [1, 2, 3, 4], name)[1] for name in ("one", "", "two")] == [3, 0, 0]
    assert cache.length("", [1, 2, 3, 4], "one") == 3
    cache.clear("")
    assert cache.nbytes == cache.match("", [1, 2, 3, 4], "one")[1] == 0


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 40))
def test_enough_is_left_to_be_read(length: int, tokens: int, tail: int) -> None:
    cache: PrefixCache[Copy] = PrefixCache(100, divisible=True, tail=tail)
    usable = cache.usable(length, tokens)
    assert usable % 64 == 0
    assert 0 <= usable <= max(length, 0)
    assert usable == 0 or tokens - usable > tail
    # And no more than that.
    assert usable + 64 > length or tokens - usable - 64 <= tail or usable + 64 >= tokens
