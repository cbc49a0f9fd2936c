"""Every family on a device is what it is on the CPU."""

import copy
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Family, each
from quintet import DynamicCache, OffloadedCache, QuantizedCache, StaticCache
from quintet.cache import Cache
from quintet.generation.engine import Engine
from quintet.generation.fixed_step import Recording
from support import relative_error

# The torch of such a machine is whichever it has.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

IDS = torch.randint(1, 101, (3, 20), generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(20) >= torch.tensor([[0], [6], [13]])).long()
# Sums of another order; a product of bfloat16 numbers is rounded to 8 bits.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2**-4}
KINDS: dict[str, Callable[[Any], Cache]] = {
    "dynamic": DynamicCache,
    "static": lambda config: StaticCache(config, 40),
    "offloaded": OffloadedCache,
    "quantised": QuantizedCache,
}


def pair(family: Family, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Any]:
    """A model on the CPU, and the same on the device."""
    changes = family.rounded if dtype == torch.bfloat16 else {}
    model = family.model_of(**changes).to(dtype)
    return [model, copy.deepcopy(model).to(device)]


def far(made: Tensor, expected: Tensor) -> float:
    """How far apart, the root mean square over that of the whole."""
    made, expected = made.detach().float().cpu(), expected.detach().float()
    return float((made - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@each
@torch.no_grad()
def test_logits_of_padded_rows(family: Family, dtype: torch.dtype, device: torch.device) -> None:
    here, there = pair(family, device, dtype)
    for mask in (None, MASK, MASK.flip(1)):
        expected = here(IDS, attention_mask=mask).logits
        made = there(IDS.to(device), attention_mask=None if mask is None else mask.to(device))
        kept = torch.ones_like(IDS).bool() if mask is None else mask.bool()
        assert far(made.logits.cpu()[kept], expected[kept]) <= BOUNDS[dtype]


@each
def test_losses_and_gradients(family: Family, device: torch.device) -> None:
    models = pair(family, device)
    for model in models:
        ids, mask = IDS.to(model.device), MASK.to(model.device)
        model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss.backward()
    named = zip(*(model.named_parameters() for model in models), strict=True)
    for (name, here), (_, there) in named:
        if here.grad is not None and here.grad.abs().max() > 1e-6:
            assert relative_error(there.grad.cpu(), here.grad) <= 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
@each
@torch.no_grad()
def test_pieces_and_steps_with_every_cache(family: Family, kind: str, device: torch.device) -> None:
    made: list[list[Tensor]] = []
    for model in pair(family, device):
        cache, at, own = KINDS[kind](model.config), [0] * 3, []
        for counts in ((5, 1, 7), (1, 1, 1), (0, 4, 2), (1, 1, 1)):
            pieces = [ids[a : a + n] for ids, a, n in zip(IDS, at, counts, strict=True)]
            ends = torch.tensor([0, *accumulate(counts)]).to(model.device)
            ids = torch.cat(pieces)[None].to(model.device)
            output = model(ids, past_key_values=cache, use_cache=True, cu_seq_lens_q=ends)
            own.append(output.logits)
            at = [a + n for a, n in zip(at, counts, strict=True)]
        made.append(own)
    for expected, logits in zip(*made, strict=True):
        # A code of few bits may be the next one.
        assert far(logits, expected) <= (1e-2 if kind == "quantised" else 1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_new_tokens": 32}, {"cache_implementation": "static"}, {"num_beams": 3}],
    ids=str,
)
@each
def test_generated_tokens(family: Family, options: dict[str, Any], device: torch.device) -> None:
    with warnings.catch_warnings():
        # That steps could not be recorded.
        warnings.simplefilter("error", UserWarning)
        expected, made = (
            model.generate(
                IDS.to(model.device),
                attention_mask=MASK.to(model.device),
                pad_token_id=0,
                **{"max_new_tokens": 12, **options},
            )
            for model in pair(family, device)
        )
    assert torch.equal(made.cpu(), expected)


@each
def test_drafts_change_no_token(family: Family, device: torch.device) -> None:
    _, model = pair(family, device)
    ids, mask = IDS.to(device), MASK.to(device)
    ways: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 3}]
    ways.append({"assistant_model": family.model_of().to(device)})
    if model.config.model_type == "deepseek_v3":
        model = family.model_of(num_nextn_predict_layers=1).to(device)
        ways.append({"use_mtp": True})
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, **common)
    for way in ways:
        assert torch.equal(model.generate(ids, **common, **way), expected), way


@each
def test_sequences_of_an_engine(family: Family, device: torch.device) -> None:
    _, model = pair(family, device)
    engine = Engine(model, rows=3, capacity=60)
    rows = [ids[mask.bool()] for ids, mask in zip(IDS, MASK, strict=True)]
    sequences = [engine.sequence(ids, max_new_tokens=10) for ids in rows]
    for sequence in sequences:
        engine.add(sequence)
        engine.step(engine.sequences, piece=4)
    while not all(sequence.finished for sequence in sequences):
        engine.step(engine.sequences, piece=4)
    for ids, sequence in zip(rows, sequences, strict=True):
        alone = model.generate(ids[None].to(device), max_new_tokens=10, pad_token_id=0)
        assert sequence.ids == alone[0].tolist()


@each
def test_steps_are_recorded_and_make_the_same_tokens(family: Family, device: torch.device) -> None:
    _, model = pair(family, device)
    tokens = []
    for recording in (None, Recording()):
        engine = Engine(model, rows=4, capacity=60, recording=recording)
        rows = [ids[mask.bool()] for ids, mask in zip(IDS, MASK, strict=True)]
        sequences = [engine.sequence(ids, max_new_tokens=20) for ids in rows]
        with warnings.catch_warnings():
            # That they could not be recorded.
            warnings.simplefilter("error")
            for sequence in sequences:
                engine.add(sequence)
                engine.step(engine.sequences)
            while not all(sequence.finished for sequence in sequences):
                engine.step(sequences)
        tokens.append([sequence.new for sequence in sequences])
    assert tokens[0] == tokens[1]


@each
def test_a_compiled_step(family: Family, device: torch.device) -> None:
    _, model = pair(family, device)
    ids = IDS[:1].to(device)
    expected = model.generate(ids, max_new_tokens=8, pad_token_id=0)
    made = model.generate(ids, max_new_tokens=8, pad_token_id=0, compile=True)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4", "fp8"])
@each
@torch.no_grad()
def test_quantised_weights(
    family: Family, quantize: str, device: torch.device, tmp_path: Path
) -> None:
    family.model_of(**family.rounded).save_pretrained(tmp_path)
    kind = family.cls("ForCausalLM")
    here = kind.from_pretrained(tmp_path, quantize=quantize)
    there = kind.from_pretrained(tmp_path, quantize=quantize, device_map=str(device))
    assert far(there(IDS.to(device)).logits, here(IDS).logits) <= 1e-2


@each
@torch.no_grad()
def test_saved_there_and_loaded_there(family: Family, device: torch.device, tmp_path: Path) -> None:
    _, model = pair(family, device)
    model.save_pretrained(tmp_path)
    again = family.cls("ForCausalLM").from_pretrained(tmp_path, device_map=str(device))
    assert again.device.type == device.type
    assert torch.equal(again(IDS.to(device)).logits, model(IDS.to(device)).logits)
