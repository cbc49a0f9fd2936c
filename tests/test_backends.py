"""One registry says who computes an operation; whoever does computes what the definition does."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from operations import CASES, Case, assert_alike, bound, outcome
from quintet import Qwen2ForCausalLM
from quintet.backends import OFF, PYTORCH, REGISTRY, Backend, Implementation, Registry
from quintet.errors import InputError, MissingDependencyError
from quintet.ops.norm import rms_norm
from support import small_config
from waiting import PATIENCE

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
X, WEIGHT = torch.randn(3, 8), torch.randn(8)


def sevens(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """A norm that can be told from others, of float32 alone."""
    return torch.full_like(x, 7.0) if x.dtype == torch.float32 else None


def toy(**changes: Any) -> Backend:
    given: dict[str, Any] = {
        "name": "toy",
        "device": "cpu",
        "implementations": {"rms norm": (Implementation(sevens, frozenset({torch.float32})),)},
        "missing": lambda: None,
    }
    return Backend(**given | changes)


def test_what_is_registered_serves_until_it_is_not() -> None:
    before = rms_norm(X, WEIGHT, 1e-5)
    with REGISTRY.registered(toy()):
        assert bool((rms_norm(X, WEIGHT, 1e-5) == 7).all())
        assert REGISTRY.served("cpu", torch.float32)["rms norm"] == "toy"
        # Where it does not apply, the next one does.
        assert not bool((rms_norm(X.bfloat16(), WEIGHT.bfloat16(), 1e-5) == 7).any())
        assert REGISTRY.served("cpu", torch.bfloat16)["rms norm"] != "toy"
        assert REGISTRY.served("cuda", torch.float32)["rms norm"] == PYTORCH
    assert torch.equal(rms_norm(X, WEIGHT, 1e-5), before)
    assert REGISTRY.served("cpu", torch.float32)["rms norm"] != "toy"


@torch.no_grad()
def test_it_serves_whole_models() -> None:
    model, calls = Qwen2ForCausalLM(small_config()).eval(), []

    def counted(x: Tensor, weight: Tensor, eps: float) -> None:
        calls.append(x.shape)

    ids = torch.arange(40)[None]
    plain = model(ids).logits
    watching = {"rms norm": (Implementation(counted, frozenset({torch.float32})),)}
    with REGISTRY.registered(toy(implementations=watching)):
        assert torch.equal(model(ids).logits, plain)
    assert len(calls) == 2 * model.config.num_hidden_layers + 1


def test_a_name_is_given_once() -> None:
    with REGISTRY.registered(toy()), pytest.raises(InputError, match="there is a backend 'toy'"):
        REGISTRY.register(toy())


def test_what_a_machine_does_not_have_serves_nothing() -> None:
    with REGISTRY.registered(toy(missing=lambda: "this machine has none")):
        assert "toy" not in REGISTRY.served("cpu", torch.float32).values()


def test_a_backend_is_switched_off_by_its_name() -> None:
    registry = Registry(["toy"])

    @registry.operation("rms norm")
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x

    registry.register(toy())
    assert norm.order == ()
    assert norm(X, WEIGHT, 1e-5) is X
    assert registry.served("cpu", torch.float32) == {"rms norm": PYTORCH}


def test_what_serves_on_request_has_to_be_asked_for() -> None:
    for on, served in (((), PYTORCH), (("toy",), "toy")):
        registry = Registry(on=on)

        @registry.operation("rms norm")
        def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return x

        registry.register(toy(on_request=True))
        assert registry.served("cpu", torch.float32) == {"rms norm": served}
        assert (norm(X, WEIGHT, 1e-5) is X) == (served == PYTORCH)
        with registry.asking("toy"):
            assert registry.served("cpu", torch.float32) == {"rms norm": "toy"}
        assert registry.served("cpu", torch.float32) == {"rms norm": served}


def test_what_is_asked_for_and_not_there_is_told_of() -> None:
    absent = toy(on_request=True, missing=lambda: "the package toy is not installed")
    Registry().register(absent)
    asked = "QUINTET_BACKENDS_ON asks for 'toy', and the package toy is not installed; install it"
    with pytest.raises(MissingDependencyError, match=asked):
        Registry(on=["toy"]).register(absent)


def test_the_environment_switches_kernels_off_all_of_them() -> None:
    code = (
        "import torch, quintet.ops.norm; from quintet.backends import REGISTRY; "
        "from quintet.kernels import outlook; from quintet.kernels.native import available; "
        "print(set(REGISTRY.served('cpu', torch.bfloat16).values()), available(), outlook())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, OFF: "other,kernels"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert run.stdout == f"{{'{PYTORCH}'}} False PyTorch alone, as turned off by {OFF}\n"


# -- every implementation and its definition ---------------------------------------------------


@contextmanager
def ordered(order: Callable[[str], tuple[Callable[..., Any], ...]]) -> Iterator[None]:
    """Have other functions asked before the definitions, given by the operation's name."""
    before = {name: declared.order for name, declared in REGISTRY.operations.items()}
    try:
        for name, declared in REGISTRY.operations.items():
            declared.order = order(name)
        yield
    finally:
        for name, declared in REGISTRY.operations.items():
            declared.order = before[name]


def fresh(case: Case) -> dict[str, Tensor]:
    """The inputs of a case, some of which are written to."""
    return {name: value.clone() for name, value in case.inputs.items()}


def run_by(case: Case, backend: Backend) -> tuple[Any, set[tuple[str, int]]]:
    """What a backend makes of a case, and which of its implementations did."""
    used: set[tuple[str, int]] = set()

    def watched(name: str, number: int, one: Implementation) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made = one.function(*args, **kwargs)
            if made is not None:
                used.add((name, number))
            return made

        return run

    def order(name: str) -> tuple[Callable[..., Any], ...]:
        given = backend.implementations.get(name, ())
        return tuple(watched(name, number, one) for number, one in enumerate(given))

    with ordered(order):
        return outcome(case, fresh(case)), used


@pytest.mark.parametrize(
    "backend",
    [backend for backend in REGISTRY.backends if not backend.on_request],
    ids=lambda backend: backend.name,
)
@torch.no_grad()
def test_every_implementation_computes_what_its_definition_does(backend: Backend) -> None:
    if reason := backend.missing():
        pytest.skip(reason)
    used: set[tuple[str, int]] = set()
    for case in CASES:
        with ordered(lambda name: ()):
            expected = outcome(case, fresh(case))
        made, by = run_by(case, backend)
        assert_alike(made, expected, case.name, bound(case))
        used |= by
    every = {
        (name, i) for name, given in backend.implementations.items() for i in range(len(given))
    }
    assert used == every, "each of them has a case in operations.py"
    assert set(backend.implementations) <= set(REGISTRY.operations)
