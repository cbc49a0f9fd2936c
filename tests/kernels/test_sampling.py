import pytest
import torch

from quintet.kernels.sampling import penalise_repetition
from quintet.ops import sampling


@pytest.mark.parametrize("penalty", [1.3, 0.6])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(("B", "T"), [(1, 40), (3, 7), (2, 0)])
def test_a_penalty_is_that_of_the_reference(
    level: str, penalty: float, masked: bool, B: int, T: int
) -> None:
    V = 50
    logits, ids = 3 * torch.randn(B, V), torch.randint(0, V + 9, (B, T + 5))[:, 2 : T + 2]
    logits[:, 3], logits[:, 4] = -torch.inf, torch.inf
    kept = torch.rand(B, T) < 0.5 if masked else None
    before = logits.clone()
    made, reference = (
        one(logits, ids, kept, penalty)
        for one in (penalise_repetition, sampling.penalise_repetition.definition)
    )
    assert made is not None
    assert torch.equal(logits, before)
    assert torch.equal(made, reference)


def test_what_is_of_another_kind_is_left_to_torch(level: str) -> None:
    ids = torch.tensor([[1, 2]])
    assert penalise_repetition(torch.randn(1, 4).double(), ids, None, 1.2) is None
    assert penalise_repetition(torch.randn(1, 4), ids.int(), None, 1.2) is None
    assert penalise_repetition(torch.randn(1, 4, requires_grad=True), ids, None, 1.2) is None
