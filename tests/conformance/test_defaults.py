"""What a program sets for all of torch changes nothing that a model computes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode

from comparisons import TOLERANCE
from conformance.families import FAMILIES, WIDE, Family, each
from quintet import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from support import relative_error

IDS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))
CACHES: dict[str, Callable[[Any], Any]] = {
    "growing": lambda model: DynamicCache(model.config),
    "preallocated": lambda model: StaticCache(model.config, max_cache_len=32),
    "quantised": lambda model: QuantizedCache(model.config, 8),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@torch.no_grad()
def run(model: Any, cache: Any) -> Tensor:
    """Logits of a prompt, of steps behind it, of a piece behind those, and of rows cut short."""
    pieces = [model(ids, past_key_values=cache).logits for ids in IDS.split([5, 1, 1, 5], dim=1)]
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]], device="cpu")
    pieces.append(model(IDS[:, :3], attention_mask=mask, past_key_values=cache).logits[:, -1:])
    cache.reset()
    pieces.append(model(IDS[:, :3], past_key_values=cache).logits)
    return torch.cat(pieces, dim=1).float()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each()
def test_logits_are_the_same_under_other_defaults(
    family: Family, dtype: torch.dtype, kind: str
) -> None:
    model = family.model_of(**{**WIDE[family.name], **family.rounded}).to(dtype)
    expected = run(model, CACHES[kind](model))
    for name, setting in SETTINGS.items():
        with setting():
            # Its own caches are made there too.
            made = run(model, CACHES[kind](model))
        # Under a mode kernels step aside, and other sums are rounded.
        # A code of few bits may be the next one then.
        exact = dtype == torch.float32
        rounds = 2**-4 if not exact else 1e-3 if kind == "quantised" else TOLERANCE
        bound = rounds if name == "meta" else 0.0
        assert relative_error(made, expected) <= bound, name


@each()
def test_texts_are_the_same_under_other_defaults(family: Family) -> None:
    model = family.model_of(**WIDE[family.name])
    chosen: dict[str, Any] = {"do_sample": True, "repetition_penalty": 1.2, "top_p": 0.9}
    texts = []
    for setting in (nullcontext, *SETTINGS.values()):
        with setting():
            torch.manual_seed(4)
            texts.append(model.generate(IDS, max_new_tokens=8, pad_token_id=0, **chosen).tolist())
    assert all(text == texts[0] for text in texts)


OPTIONS: dict[str, dict[str, Any]] = {
    "words": {"bad_words_ids": [[5], [6, 7]], "sequence_bias": {(3,): 2.3}},
    "lists": {"suppress_tokens": [1], "begin_suppress_tokens": [2], "forced_bos_token_id": 4},
    "ends": {"eos_token_id": [5], "min_new_tokens": 2, "forced_eos_token_id": 5},
    "beams": {"num_beams": 3, "do_sample": False},
    "lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "each its own": {
        "generation_config": [
            GenerationConfig(do_sample=True, top_k=3, max_new_tokens=8, pad_token_id=0),
            GenerationConfig(repetition_penalty=1.2, max_new_tokens=8, pad_token_id=0),
        ]
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_mean_the_same_under_other_defaults(options: str) -> None:
    [family] = [family for family in FAMILIES if family.name == "qwen2"]
    model = family.model_of(**WIDE[family.name])
    plain = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": True}
    given = OPTIONS[options] if "own" in options else plain | OPTIONS[options]
    texts = []
    for setting in (nullcontext, *SETTINGS.values()):
        with setting():
            torch.manual_seed(4)
            texts.append(model.generate(IDS, **given).tolist())
    assert all(text == texts[0] for text in texts)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each()
def test_tangents_are_carried_through_a_step(family: Family) -> None:
    """Forward-mode derivatives need no gradients to be recorded."""
    # torch's own fused attention has no tangents on a CPU.
    model = family.model_of(**WIDE[family.name], attn_implementation="eager")
    direction = torch.randn(2, 1, model.config.hidden_size)
    tangents = []
    # There are no kernels for float64.
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        cache = DynamicCache(model.config)
        with torch.no_grad(), forward_ad.dual_level():
            embeds = model.get_input_embeddings()(IDS)
            model(inputs_embeds=embeds[:, :-1], past_key_values=cache)
            dual = forward_ad.make_dual(embeds[:, -1:], direction.to(dtype))
            out = model(inputs_embeds=dual, past_key_values=cache)
            tangents.append(forward_ad.unpack_dual(out.logits).tangent)
    assert tangents[0] is not None
    assert tangents[1] is not None
    assert relative_error(tangents[1].double(), tangents[0]) <= 1e-3


@each()
def test_a_mode_sees_every_operation(family: Family) -> None:
    class Seen(BaseTorchFunctionMode):
        names: set[str]

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model = family.model_of()
    cache = DynamicCache(model.config)
    with torch.no_grad(), Seen() as seen:
        seen.names = set()
        model(IDS, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    assert "linear" in seen.names
