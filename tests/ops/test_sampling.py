"""Each processor is Transformers', and draws follow the distribution."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from quintet.errors import InputError
from quintet.ops.sampling import (
    above_min_p,
    draw,
    draw_several,
    in_top_k,
    in_top_p,
    likeliest,
    penalise_frequency,
    penalise_presence,
    penalise_repetition,
    top_k_candidates,
)

V = 53
IDS = torch.zeros(4, 1, dtype=torch.long)
LOGITS = {
    "spread": lambda: 3 * torch.randn(4, V),
    "flat": lambda: 0.01 * torch.randn(4, V),
    "peaked": lambda: torch.eye(V)[:4] * 40,
    "ties": lambda: torch.randint(-2, 3, (4, V)).float(),
    "equal": lambda: torch.zeros(4, V),
    "banned": lambda: torch.randn(4, V).masked_fill(torch.rand(4, V) < 0.5, -torch.inf),
}


def only(logits: Tensor, kept: Tensor) -> Tensor:
    return logits.masked_fill(~kept, -torch.inf)


each_kind = pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)


@each_kind
@pytest.mark.parametrize("k", [1, 2, 7, V, 10 * V], ids=lambda k: f"k{k}")
def test_top_k(make: Callable[[], Tensor], k: int) -> None:
    logits = make()
    assert torch.equal(only(logits, in_top_k(logits, k)), theirs.TopKLogitsWarper(k)(IDS, logits))


@each_kind
@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_min_p(make: Callable[[], Tensor], p: float) -> None:
    logits = make()
    assert torch.equal(
        only(logits, above_min_p(logits, p)), theirs.MinPLogitsWarper(p)(IDS, logits)
    )


@pytest.mark.parametrize("kind", ["spread", "flat", "peaked", "banned"])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(kind: str, p: float) -> None:
    logits = LOGITS[kind]()
    assert torch.equal(only(logits, in_top_p(logits, p)), theirs.TopPLogitsWarper(p)(IDS, logits))


@each_kind
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(make: Callable[[], Tensor], p: float) -> None:
    logits = make()
    kept = only(logits, in_top_p(logits, p))
    probabilities = logits.softmax(dim=-1)
    for row in range(len(kept)):
        held = probabilities[row][kept[row] > -torch.inf]
        assert float(held.sum()) >= p - 1e-5
        assert float(held.sum() - held.min()) < p + 1e-5
        dropped = probabilities[row][kept[row] == -torch.inf]
        assert dropped.numel() == 0 or float(dropped.max()) <= float(held.min())
    assert torch.equal(kept[kept > -torch.inf], logits[kept > -torch.inf])


@each_kind
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty(make: Callable[[], Tensor], penalty: float) -> None:
    logits = make()
    ids = torch.randint(0, V, (4, 20))
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    before = logits.clone()
    assert torch.equal(penalise_repetition(logits, ids, None, penalty), expected)
    assert torch.equal(logits, before)


def test_what_is_not_kept_does_not_occur() -> None:
    ids = torch.tensor([[0, 0, 5, 0], [0, 0, 5, 5]])
    kept = torch.tensor([[False, False, True, True], [False, False, True, True]])
    logits = torch.ones(2, V)
    for penalise, twice in (
        (penalise_repetition, 0.5),
        (penalise_presence, -1.0),
        (penalise_frequency, -3.0),
    ):
        made = penalise(logits, ids, kept, 2.0)
        assert (made != 1).nonzero().tolist() == [[0, 0], [0, 5], [1, 5]]
        assert float(made[1, 5]) == twice
        # An embedding may have more rows than there are logits.
        few = penalise(logits[:, :3], ids, kept, 2.0)
        assert (few != 1).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("scale", [0.1, 2.0, 5.0])
def test_top_p_of_a_large_vocabulary(p: float, scale: float) -> None:
    """Nearly all of it in a few tokens, or spread over more than are looked at first."""
    logits = scale * torch.randn(3, 20_000)
    kept, least = in_top_p(logits, p, least=2), 2
    for row in range(3):
        values, order = logits[row].double().softmax(dim=-1).sort(descending=True)
        count = max(int((values.cumsum(dim=-1) - values < p).sum()), least)
        assert abs(int(kept[row].sum()) - count) <= max(1, count // 1000)
        assert bool(kept[row][order[: count - 1 - count // 1000]].all())


@each_kind
@pytest.mark.parametrize("k", [1, 5, 30])
def test_few_candidates_are_those_of_the_whole(make: Callable[[], Tensor], k: int) -> None:
    logits = make()
    few = top_k_candidates(logits, k)
    kept = only(logits, in_top_k(logits, k))
    assert few is not None
    values, ids, crowded = few
    spread = torch.full_like(logits, -torch.inf).scatter(1, ids, values)
    whole = torch.ones(len(logits), dtype=torch.bool) if crowded is None else ~crowded
    assert torch.equal(spread[whole], kept[whole])
    # Where some are missing, more are kept than there is room for.
    assert bool(((kept > -torch.inf).sum(dim=-1) > ids.shape[1])[~whole].all())


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    likely = expected > 0
    assert not counts[~likely].any()
    return float(((counts - expected) ** 2 / expected)[likely].sum())


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.07, 0.03, 0.0])
    torch.manual_seed(1)
    tokens = draw(7 * probabilities.expand(20_000, -1))
    counts = torch.bincount(tokens, minlength=7).float()
    # 4 degrees of freedom: one seed in a thousand is above.
    assert chi_square(counts, probabilities) < 18.5


def test_several_draws_are_without_replacement() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    torch.manual_seed(1)
    drawn = draw_several(probabilities.log().expand(20_000, -1), 2)
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    pairs = torch.zeros(3, 3)
    for first in range(3):
        for second in range(3):
            if first != second:
                share = probabilities[second] / (1 - probabilities[first])
                pairs[first, second] = probabilities[first] * share
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9).float()
    # 5 degrees of freedom: one seed in a thousand is above.
    assert chi_square(counts, pairs.flatten()) < 20.6


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_nothing_to_draw_is_an_error(value: float) -> None:
    probabilities = torch.full((2, 3), 1 / 3)
    probabilities[1] = value
    with pytest.raises(InputError, match="row 1 has no token to take"):
        draw(probabilities)
    drawn = draw(probabilities, unfinished=torch.tensor([True, False]))
    assert 0 <= int(drawn[1]) < 3


def test_a_rows_generator_alone_decides_its_draw() -> None:
    def drawn(seeds: list[int]) -> list[int]:
        rows = torch.ones(len(seeds), 1000)
        return draw(rows, [torch.Generator().manual_seed(seed) for seed in seeds]).tolist()

    first = drawn([3, 4, 5])
    assert drawn([5, 3]) == [first[2], first[0]]
    assert len(set(first)) == 3


def test_without_generators_torchs_own_seed_counts() -> None:
    torch.manual_seed(5)
    shared = draw(torch.ones(8, 1000))
    assert not torch.equal(shared, draw(torch.ones(8, 1000)))
    torch.manual_seed(5)
    assert torch.equal(shared, draw(torch.ones(8, 1000)))


@pytest.mark.parametrize("size", [53, 16_383, 16_384, 16_400, 40_001])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)], ids=str)
def test_the_likeliest_is_the_first_of_the_largest(shape: tuple[int, ...], size: int) -> None:
    """Wherever it is, and among equals, infinities and what is no number."""
    torch.manual_seed(size)
    for scores in (
        torch.randn(*shape, size),
        torch.randint(0, 3, (*shape, size)).float(),
        torch.full((*shape, size), -torch.inf),
        torch.randn(*shape, size).bfloat16().float(),
    ):
        for place, value in ((None, 0.0), (size - 1, 9.0), (size // 2, torch.nan), (0, torch.inf)):
            if place is not None:
                scores[..., place] = value
            best, tokens = likeliest(scores)
            assert torch.equal(tokens, scores.argmax(dim=-1))
            expected = scores.gather(-1, tokens[..., None])[..., 0]
            torch.testing.assert_close(best, expected, rtol=0, atol=0, equal_nan=True)
