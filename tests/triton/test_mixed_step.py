"""Pieces of prompts and steps in one forward over a pool are kept and attended to in one launch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES
from quintet.backends import REGISTRY, Backend, Implementation
from quintet.cache import PooledCache
from support import relative_error

pytest.importorskip("triton", reason="Triton is made for Linux")

from quintet.triton.attention import attend_pages
from quintet.triton.keeping import rotate_and_keep

# How many tokens each of three rows is given by each forward.
SCHEDULE = ((5, 1, 7), (1, 6, 1), (1, 0, 2), (3, 1, 1))
# Rows beside each other that have a token each are one.
RECTANGLES = (3, 3, 2, 2)
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
IDS = torch.randint(6, 90, (3, 11), generator=torch.Generator().manual_seed(3))
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize(
    ("name", "changes"), [("qwen2", {}), ("qwen2", WINDOW), ("deepseek-v2", {})]
)
@torch.no_grad()
def test_tokens_of_rows_see_their_own(
    name: str, changes: dict[str, Any], fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("QUINTET_KERNELS", "0")
    model = BY_NAME[name].model_of(num_hidden_layers=2, **changes)
    calls: dict[str, list[bool]] = {"attend": [], "keep": []}

    def watched(kind: str, function: Any) -> Implementation:
        def run(*given: Any, **how: Any) -> Tensor | None:
            made: Tensor | None = function(*given, **how)
            calls[kind].append(made is not None)
            return made

        return Implementation(run, frozenset({torch.float32}))

    kernels = {
        "attention over pages": (watched("attend", attend_pages),),
        "rotate and keep": (watched("keep", rotate_and_keep),),
    }
    backend = Backend(name="pages", device="cpu", implementations=kernels, missing=lambda: None)
    pool, at, made = PooledCache(model.config, 3, 16), [0, 0, 0], []
    with REGISTRY.registered(backend):
        for counts in SCHEDULE:
            pieces = [ids[a : a + n] for ids, a, n in zip(IDS, at, counts, strict=True)]
            ends = torch.tensor([0, *counts]).cumsum(0)
            output = model(torch.cat(pieces)[None], past_key_values=pool, cu_seq_lens_q=ends)
            made.append(output.logits[0].split(list(counts)))
            at = [a + n for a, n in zip(at, counts, strict=True)]
    # The first forward takes the memory, and attends rectangle by rectangle, as latents always do,
    # each in the cheaper of its two ways.
    assert calls["keep"] == [True] * 2 * (len(SCHEDULE) - 1)
    later = RECTANGLES[1:] if name == "deepseek-v2" else [1] * (len(SCHEDULE) - 1)
    assert calls["attend"] == [True] * 2 * (RECTANGLES[0] + sum(later))
    for row, (ids, length) in enumerate(zip(IDS, at, strict=True)):
        right = model(ids[None, :length]).logits[0]
        assert relative_error(torch.cat([one[row] for one in made]), right) < 1e-5
