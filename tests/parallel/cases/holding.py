"""Cases of what each process of a training holds from the beginning."""

import ctypes
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from parallel.cases.tensor import family
from parallel.cases.training import config_of
from quintet import AutoConfig, PreTrainedConfig, Qwen2Config
from quintet.kernels.allocator import MMAP_THRESHOLD, keep
from quintet.modeling.fresh import new_model
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.source import ModelSource
from quintet.training.joining import joined, local_part, parallelize
from quintet.training.optimizers.layout import LOCAL

# Of a model that is large enough to be told from what else a process needs.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 512,
}


def config_like(path: Path | None, name: str) -> PreTrainedConfig:
    return family(name).model_of().config if path is None else AutoConfig.from_pretrained(path)


def parts(
    name: str, path: Path | None, degrees: dict[str, Any], precision: str, dtype: str
) -> None:
    """Compare what processes have of a model that is new, or read, with what one has."""
    config = config_of(degrees, precision=precision)
    cls = family(name).cls("ForCausalLM")
    made = config_like(path, name)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ranks = joined(config.parallel)
    own = local_part(config, ranks)
    assert own is not None
    torch.manual_seed(5)
    if path is None:
        model = own.new(cls, made, kind)
    else:
        source = ModelSource(path)
        model = own.loaded(cls, source, dtype=dtype, quantize=None, overrides={})
    drawn = torch.rand(1)
    layout = parallelize(model, config, ranks, part=True)
    torch.manual_seed(5)
    whole = new_model(cls, made, kind) if path is None else cls.from_pretrained(path, dtype=dtype)
    if path is None:
        # What is drawn afterwards is the same, too.
        assert torch.equal(drawn, torch.rand(1))
    wanted: Mapping[str, Tensor] = whole.state_dict()
    found = model.state_dict(keep_vars=True)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        part = layout.local(tensor.detach())
        assert not part.is_meta
        assert torch.equal(layout.whole(first(model, key), part).to(wanted[key]), wanted[key]), key
    count = sum(layout.local(p.detach()).numel() for p in model.parameters())
    of = sum(p.numel() for p in whole.parameters())
    assert count < 0.75 * of
    with torch.no_grad():
        ids = torch.arange(7)[None]
        logits = layout.run(lambda: model(input_ids=ids).logits.float())
        bound = 1e-4 if dtype == precision == "float32" else 0.1
        torch.testing.assert_close(logits, whole(input_ids=ids).logits.float(), rtol=0, atol=bound)


def first(model: CausalLMHead, name: str) -> str:
    """Return the first name of a tensor."""
    state = model.state_dict(keep_vars=True)
    return next(other for other, tensor in state.items() if tensor is state[name])


def peak() -> int:
    """Return the most memory, in bytes, that was resident since it was asked for last."""
    text = Path("/proc/self/status").read_text()
    (most,) = (line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))
    # proc(5): from here on it counts anew.
    Path("/proc/self/clear_refs").write_text("5")
    return int(most) * 1024


@contextmanager
def handed_back() -> Iterator[None]:
    """Let memory that is freed go back to the system at once."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        keep(mallopt)


def peaks(path: Path | None, degrees: dict[str, Any]) -> tuple[float, float]:
    """Return the memory at its most while a model is made, over its size: a part's, the whole's."""
    config = config_of(degrees)
    ranks = joined(config.parallel)
    own = local_part(config, ranks)
    assert own is not None
    # What divides models takes memory, too, when it is read.
    assert fully_shard
    cls = family("qwen2").cls("ForCausalLM")
    made = Qwen2Config(**SIZES)
    found = []
    with handed_back():
        for where in (own, None):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            peak()
            before = peak()
            if where is None and path is not None:
                model = cls.from_pretrained(path)
                # Weights in a mapped file are there when they are read.
                size = sum(float(p.detach().sum()) * 0 + p.nbytes for p in model.parameters())
                layout = LOCAL
            elif where is None:
                model, layout = new_model(cls, made, torch.float32), LOCAL
                size = sum(p.nbytes for p in model.parameters())
            else:
                options: Any = {"dtype": "float32", "quantize": None, "overrides": {}}
                model = (
                    where.loaded(cls, ModelSource(path), **options)
                    if path is not None
                    else where.new(cls, made, torch.float32)
                )
                layout = parallelize(model, config, ranks, part=True)
            found.append(peak() - before)
            del model, layout
    return found[0] / size, found[1] / size
