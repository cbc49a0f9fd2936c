"""The three forms of the experts' sum equal its definition, and the balance loss its equations."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from quintet.ops.activations import ACTIVATIONS
from quintet.ops.moe import (
    apply_experts,
    crossed_experts,
    gathered_experts,
    grouped_experts,
    looped_experts,
    switch_balance_loss,
    top_experts,
)
from support import relative_error

TOLERANCE = 1e-5
Form = Callable[..., Tensor]
FORMS = [looped_experts, grouped_experts, gathered_experts, crossed_experts]
N, C, F, E, A = 9, 12, 7, 5, 2
silu = ACTIVATIONS["silu"]


def definition(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Every token by itself, through each of its experts."""
    rows = []
    for token, chosen, shares in zip(x, indices, weights, strict=True):
        made = torch.zeros_like(token)
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            made = made + share * (down[expert] @ (silu(gate) * up))
        rows.append(made)
    return torch.stack(rows)


def problem(
    n: int = N, c: int = C, f: int = F, e: int = E, a: int = A, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    indices = torch.rand(n, e).topk(a).indices
    weights = torch.rand(n, a, dtype=dtype)
    gate_up, down = torch.randn(e, 2 * f, c, dtype=dtype), torch.randn(e, c, f, dtype=dtype)
    return torch.randn(n, c, dtype=dtype), indices, weights, gate_up, down


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    c=st.integers(1, 9),
    f=st.integers(1, 9),
    e=st.integers(1, 7),
    seed=st.integers(0, 2**30),
    data=st.data(),
)
def test_forms_equal_the_definition(
    form: Form, n: int, c: int, f: int, e: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    inputs = problem(n, c, f, e, data.draw(st.integers(1, e)), torch.float64)
    assert torch.allclose(form(*inputs, silu), definition(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_forms_equal_the_definitions(form: Form) -> None:
    def gradients(f: Form) -> list[Tensor | None]:
        torch.manual_seed(3)
        x, indices, weights, gate_up, down = problem()
        indices[indices == 4] = 0  # an expert that nobody chose has a gradient of zeros
        inputs = (x, weights, gate_up, down)
        for tensor in inputs:
            tensor.requires_grad_()
        (f(x, indices, weights, gate_up, down).square().sum()).backward()
        return [tensor.grad for tensor in inputs]

    made = gradients(lambda *inputs: form(*inputs, silu))
    for mine, other in zip(made, gradients(definition), strict=True):
        assert mine is not None
        assert other is not None
        assert relative_error(mine, other) < TOLERANCE
    assert made[2] is not None
    assert not made[2][4].any()


@pytest.mark.parametrize("frozen", ["x", "matrices"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    for form in FORMS:
        x, indices, weights, gate_up, down = problem()
        for tensor in (gate_up, down) if frozen == "x" else (x,):
            tensor.requires_grad_()
        form(x, indices, weights, gate_up, down, silu).sum().backward()
        assert (x.grad is None) == (frozen == "x")
        assert (down.grad is None) == (frozen == "matrices")


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_terms_are_added_in_float32(form: Form) -> None:
    # Eight times the same: bfloat16 has no 257 and would stay at 256 from there on.
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up = torch.ones(8, 2, 1, dtype=torch.bfloat16)
    down = torch.tensor([256.0, *[1.0] * 7], dtype=torch.bfloat16).reshape(8, 1, 1)
    indices, shares = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.bfloat16)
    made = form(x, indices, shares, gate_up, down, lambda gate: gate)
    assert made.dtype == torch.bfloat16
    assert made.item() == torch.tensor(263.0).bfloat16().item() == 264


@pytest.mark.parametrize("form", FORMS)
def test_shares_of_a_wider_dtype_are_not_rounded_first(form: Form) -> None:
    x, indices, _, gate_up, down = problem(dtype=torch.bfloat16)
    exact = torch.rand(N, A)
    made = form(x, indices, exact, gate_up, down, silu)
    again = form(x, indices, exact.bfloat16(), gate_up, down, silu)
    assert made.dtype == torch.bfloat16
    assert not torch.equal(made, again)
    wide = definition(x.float(), indices, exact, gate_up.float(), down.float())
    assert relative_error(made.float(), wide) < 0.02


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made anew, and how many have three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.stacks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numel = max(self.numel, out.numel())
            self.stacks += out.ndim == 3
        return out


@torch.no_grad()
def test_the_loop_copies_no_weights() -> None:
    x, indices, weights, gate_up, down = problem(n=3, c=64, f=32, e=16)
    with Largest() as loop:
        looped_experts(x, indices, weights, gate_up, down, silu)
    assert loop.numel <= 3 * 64
    with Largest() as gather:
        gathered_experts(x, indices, weights, gate_up, down, silu)
    assert gather.numel == 3 * 2 * 32 * 64


@torch.no_grad()
def test_experts_nobody_chose_are_not_read() -> None:
    for form in FORMS:
        x, indices, weights, gate_up, down = problem()
        indices[indices == 4] = 0
        expected = form(x, indices, weights, gate_up, down, silu)
        gate_up[4], down[4] = torch.nan, torch.nan
        assert torch.equal(form(x, indices, weights, gate_up, down, silu), expected)


def test_compiled_once_for_any_routing_forward_and_backward() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(apply_experts, backend=counter, fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        x, indices, weights, gate_up, down = problem()
        results = []
        for f in (compiled, looped_experts):
            inputs = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
            out = f(inputs[0], indices, *inputs[1:], silu)
            out.square().sum().backward()
            results.append([out, *(t.grad for t in inputs)])
        for mine, other in zip(*results, strict=True):
            assert relative_error(mine, other) < TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_forms_work_under_autocast(mixed: bool) -> None:
    for form in FORMS:
        x, indices, weights, gate_up, down = problem()
        x = x.bfloat16() if mixed else x
        for tensor in (x, gate_up, down):
            tensor.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            made = form(x, indices, weights, gate_up, down, silu)
        made.sum().backward()
        for tensor in (x, gate_up, down):
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
        wide = definition(x.float(), indices, weights, gate_up, down)
        assert relative_error(made.float(), wide) < 0.03


def test_training_takes_the_form_with_lean_gradients() -> None:
    """Each slice's gradient would be of the whole stack's size; one such is made here, not E."""
    x, indices, weights, gate_up, down = problem(n=40, e=16)
    gate_up.requires_grad_()
    down.requires_grad_()
    loss = apply_experts(x, indices, weights, gate_up, down, silu).sum()
    with Largest() as backward:
        loss.backward()
    assert backward.stacks == 2


def test_the_operators_are_sound() -> None:
    x, matrices = torch.randn(6, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    counts = torch.tensor([4, 0, 2])
    torch.library.opcheck(torch.ops.quintet.grouped_linear.default, (x, matrices, counts))
    y = torch.randn(6, 5)
    torch.library.opcheck(torch.ops.quintet.grouped_outer.default, (y, x.detach(), counts))


def test_compiled_backward_is_traced_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, backend="aot_eager", fullgraph=True)
    x, indices, weights, gate_up, down = problem()
    results = []
    for f in (compiled, looped_experts):
        inputs = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        f(inputs[0], indices, *inputs[1:], silu).square().sum().backward()
        results.append([t.grad for t in inputs])
    for mine, other in zip(*results, strict=True):
        assert mine is not None
        assert other is not None
        assert relative_error(mine, other) < TOLERANCE


@pytest.mark.parametrize("normalise", [False, True])
def test_top_experts_are_the_most_probable(normalise: bool) -> None:
    logits = torch.randn(N, E)
    indices, shares = top_experts(logits, 3, normalise=normalise)
    for row in range(N):
        odds = [float(logits[row, e].exp()) for e in range(E)]
        best = sorted(range(E), key=lambda e: -odds[e])[:3]
        total = sum(odds[e] for e in best) if normalise else sum(odds)
        assert indices[row].tolist() == best
        assert shares[row].tolist() == pytest.approx([odds[e] / total for e in best], rel=1e-5)


def test_experts_are_told_apart_where_bfloat16_probabilities_are_not() -> None:
    # 1/1024 apart around 1/4: in bfloat16 all four probabilities are 0.25.
    logits = torch.tensor([[0.0, 0.001, 0.002, 0.003]], dtype=torch.bfloat16)
    indices, shares = top_experts(logits, 2, normalise=False)
    assert indices.tolist() == [[3, 2]]
    assert shares.dtype == torch.bfloat16


def plain_balance(router_logits: list[Tensor], a: int, mask: Tensor) -> float:
    e = router_logits[0].shape[1]
    f, p, tokens = [0.0] * e, [0.0] * e, 0
    for logits in router_logits:
        for row, kept in zip(logits, mask.flatten().tolist(), strict=True):
            if kept:
                odds = row.double().softmax(-1)
                tokens += 1
                for expert in odds.topk(a).indices.tolist():
                    f[expert] += 1
                p = [x + float(y) for x, y in zip(p, odds, strict=True)]
    return e * sum(x / tokens * y / tokens for x, y in zip(f, p, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_follows_its_equations(padded: bool) -> None:
    logits = [torch.randn(12, E) for _ in range(3)]
    mask = torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    expected = plain_balance(logits, A, mask)
    assert float(switch_balance_loss(logits, A, mask)) == pytest.approx(expected, rel=1e-5)


def test_balance_loss_of_equal_experts_is_their_number_a_token() -> None:
    logits = [torch.zeros(8, E)]
    assert float(switch_balance_loss(logits, A, torch.ones(1, 8))) == pytest.approx(A)
    nobody = switch_balance_loss(logits, A, torch.zeros(1, 8))
    assert float(nobody) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("wrong", [-1, E])
def test_experts_that_do_not_exist_are_an_error(
    dtype: torch.dtype, tokens: int, wrong: int
) -> None:
    x, gate_up, down = (
        torch.randn(shape).to(dtype) for shape in ((tokens, C), (E, 2 * F, C), (E, C, F))
    )
    indices, weights = torch.zeros(tokens, A, dtype=torch.long), torch.ones(tokens, A)
    indices[-1, -1] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        apply_experts(x, indices, weights, gate_up, down, silu)
