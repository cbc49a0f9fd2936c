"""Kernels change how fast a text is read, in every family, format and cache, and not what comes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import WIDE, Family, each
from quintet import DynamicCache, QuantizedCache, StaticCache
from quintet.kernels import calls

CACHES: dict[str, Callable[[Any], Any]] = {
    "growing": lambda model: DynamicCache(model.config),
    "preallocated": lambda model: StaticCache(model.config, max_cache_len=80),
    "quantised": lambda model: QuantizedCache(model.config, 8),
}
IDS = torch.randint(101, (3, 64), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(3, 20, dtype=torch.long)
MASK[1, :7] = 0


@torch.no_grad()
def read(model: Any, cache: Any) -> Tensor:
    """The last logits of a prompt of ragged rows, of steps, and of pieces long and short."""
    made = [model(IDS[:, :20], attention_mask=MASK, past_key_values=cache).logits[:, -1:]]
    for length in (1, 1, 3, 35):
        ids = IDS[:, cache.get_seq_length() :][:, :length]
        made.append(model(ids, past_key_values=cache).logits[:, -1:])
    return torch.cat(made, dim=1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@each()
def test_logits_are_those_without_kernels(
    family: Family,
    quantize: str | None,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = family.model_of(**{**WIDE[family.name], **family.rounded})
    whole.save_pretrained(tmp_path)
    model = type(whole).from_pretrained(tmp_path, quantize=quantize, dtype=dtype).eval()
    rough = 2**-4 if dtype == torch.bfloat16 else 1e-4 if quantize is None else 2**-8
    for kind, cache_of in CACHES.items():
        made = read(model, cache_of(model))
        with monkeypatch.context() as without:
            without.setattr(calls, "available", lambda: False)
            expected = read(model, cache_of(model))
        # Numbers that a cache rounds may be rounded to the other side.
        bound = max(rough, 2**-5) if kind == "quantised" else rough
        assert float((made - expected).norm() / expected.norm()) <= bound, kind


@each()
def test_a_text_is_written_by_kernels(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one under sampling, beams and speculation, as far as seeds tell."""
    model = family.model_of(**WIDE[family.name])
    plans: list[dict[str, Any]] = [
        {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
        {"num_beams": 3, "do_sample": False},
        {"prompt_lookup_num_tokens": 4, "do_sample": False},
    ]
    for plan in plans:
        ids = IDS[:1, :20] if "prompt_lookup_num_tokens" in plan else IDS[:, :20]
        texts = []
        for there in (True, False):
            with monkeypatch.context() as patch:
                if not there:
                    patch.setattr(calls, "available", lambda: False)
                torch.manual_seed(5)
                texts.append(model.generate(ids, max_new_tokens=12, pad_token_id=0, **plan))
        assert torch.equal(*texts), plan
