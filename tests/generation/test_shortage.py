"""A generation that there is too little memory for says how many rows fit, and holds nothing."""

from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family, each
from quintet.errors import DoesNotFitError
from quintet.generation import shortage
from quintet.serving.memory import cost_of

IDS = torch.randint(6, 90, (4, 9), generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, Any] = {"eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": 11}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=["cuda", "allocator", "host"],
)
@each
def test_how_many_rows_fit_is_said_and_they_do(
    family: Family, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.model_of(**family.shallow)
    expected = model.generate(IDS[:2], **PLAIN)
    row = cost_of(model, None).of(20)
    monkeypatch.setattr(shortage, "free_memory", lambda device: int(2.5 * row / shortage.SHARE))

    def allocates(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        # In a step, not in the prompt.
        if len(args[0]) > 2 and args[0].shape[1] == 1:
            raise error

    model.model.layers[-1].register_forward_pre_hook(allocates)
    said = r"4 rows of 20 tokens.*about 2 such rows fit; give"
    with pytest.raises(DoesNotFitError, match=said) as caught:
        model.generate(IDS, **PLAIN)
    assert caught.value.__cause__ is error
    assert error.__traceback__ is None
    assert torch.equal(model.generate(IDS[:2], **PLAIN), expected)


def test_a_prompt_that_takes_too_much_is_told_apart() -> None:
    model = FAMILIES[0].model_of()

    def allocates(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 4:
            raise MemoryError

    model.model.layers[-1].register_forward_pre_hook(allocates)
    with pytest.raises(DoesNotFitError, match=r"it was the prompt.*prefill_chunk_size"):
        model.generate(IDS, **PLAIN)
    assert model.generate(IDS, prefill_chunk_size=4, **PLAIN).shape == (4, 20)


def test_other_errors_are_what_they_are() -> None:
    model = FAMILIES[0].model_of()

    def fails(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("shapes do not fit")

    model.model.layers[-1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        model.generate(IDS, **PLAIN)
