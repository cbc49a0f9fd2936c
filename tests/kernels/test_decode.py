import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.kernels.decode import decode
from support import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=3),
    K=st.integers(1, 3),
    G=st.integers(1, 7),
    D=st.sampled_from([16, 32, 48, 64, 128]),
    window=st.sampled_from([None, 1, 7, 200]),
    threads=st.integers(1, 5),
)
def test_each_row_sees_what_came_before(
    level: str,
    dtype: torch.dtype,
    lengths: list[int],
    K: int,
    G: int,
    D: int,
    window: int | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    B, S = len(lengths), max(lengths) + 5
    q = (2 * torch.randn(B, 1, K * G, D)).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, K, S + 3, D).to(dtype)[:, :, :S] for _ in range(2))
    start = torch.tensor(lengths) - 1
    for b, length in enumerate(lengths):
        # What lies behind must not be read.
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    made = decode(q, k, v, start=start, window=window, scale=0.3)
    assert made is not None
    for b, length in enumerate(lengths):
        seen = slice(0 if window is None else max(0, length - window), length)
        exact = F.scaled_dot_product_attention(
            q[b].double(),
            k[b, :, seen].double(),
            v[b, :, seen].double(),
            scale=0.3,
            enable_gqa=True,
        )
        assert relative_error(made[b].double(), exact) <= BOUND[dtype]
    if B == 1:
        same = decode(q, k, v, start=lengths[0] - 1, window=window, scale=0.3)
        assert same is not None
        torch.testing.assert_close(same, made, rtol=0, atol=0)


def test_what_it_cannot_do_is_left_to_torch(level: str) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        return decode(q, k, v, start=4, window=None, scale=1.0)

    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 5, 16)
    assert run(q, k, k) is not None
    assert run(torch.randn(1, 4, 2, 16), k, k) is None, "the second query has no key of its own"
    assert run(torch.randn(1, 4, 17, 16), k, k) is None
    assert run(q[..., :8], k[..., :8], k[..., :8]) is None
    assert run(q.half(), k.half(), k.half()) is None
    assert run(q, k, torch.randn(1, 2, 5, 32)) is None
    assert run(q.requires_grad_(), k, k) is None
