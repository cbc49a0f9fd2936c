"""Each processor is Transformers', and draws follow the distribution."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from quintet.ops.sampling import draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

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
each_kind = pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)


@each_kind
@pytest.mark.parametrize("k", [1, 2, 7, V, 10 * V], ids=lambda k: f"k{k}")
def test_top_k(make: Callable[[], Tensor], k: int) -> None:
    logits = make()
    assert torch.equal(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(IDS, logits))


@each_kind
@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_min_p(make: Callable[[], Tensor], p: float) -> None:
    logits = make()
    assert torch.equal(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(IDS, logits))


@pytest.mark.parametrize("kind", ["spread", "flat", "peaked", "banned"])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(kind: str, p: float) -> None:
    logits = LOGITS[kind]()
    assert torch.equal(keep_top_p(logits, p), theirs.TopPLogitsWarper(p)(IDS, logits))


@each_kind
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(make: Callable[[], Tensor], p: float) -> None:
    logits = make()
    kept = keep_top_p(logits, p)
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
    assert torch.equal(
        penalise_repetition(logits, ids, torch.ones_like(ids) > 0, penalty), expected
    )
    assert torch.equal(logits, before)


def test_padding_is_no_repetition() -> None:
    logits = torch.ones(2, V)
    ids = torch.tensor([[0, 0, 5, 0], [0, 0, 0, 5]])
    kept = torch.tensor([[False, False, True, True], [False, False, False, True]])
    changed = penalise_repetition(logits, ids, kept, 2.0) != 1
    assert changed.nonzero().tolist() == [[0, 0], [0, 5], [1, 5]]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03, 0.0])
    draws = 20_000
    tokens = draw(probabilities.log().expand(draws, -1), torch.Generator().manual_seed(1))
    counts = torch.bincount(tokens, minlength=6)
    expected = draws * probabilities[:5]
    chi_square = float(((counts[:5] - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand is above
    assert counts[5] == 0


def test_a_generator_alone_decides_the_draw() -> None:
    logits = torch.zeros(8, 1000)
    first = draw(logits, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, draw(logits, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, draw(logits, torch.Generator().manual_seed(4)))
    torch.manual_seed(5)
    shared = draw(logits, None)
    torch.manual_seed(5)
    assert torch.equal(shared, draw(logits, None))
