"""Cases of models that several processes load; each compares with one that is loaded whole."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.cases.tensor import family, world
from quintet import AutoModelForCausalLM, LoraConfig
from quintet.checkpoint.mapping import MappedFile
from quintet.errors import CheckpointError, InputError, RankFailedError
from quintet.modeling.core import ModelCore
from quintet.modeling.loading import NewHeadWarning, Options, load
from quintet.modeling.source import ModelSource
from quintet.parallel.apply import shards_of
from quintet.parallel.placement import table_of
from quintet.parallel.stages import names_of_process, stages_to_run
from quintet.parallel.world import World
from quintet.quantization import Quantized
from support import relative_error

# Widths of whole blocks, also of a half.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128, "intermediate_size": 256},
    "qwen2-moe": {
        **{"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128},
        "shared_expert_intermediate_size": 128,
    },
    "deepseek-v3": {
        **{"intermediate_size": 128, "moe_intermediate_size": 128, "v_head_dim": 32},
        "hidden_size": 128,
    },
    "zamba2": {"hidden_size": 128, "intermediate_size": 128},
}
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "nf4": {"quantize": "nf4"},
    "fp8": {"quantize": "fp8"},
    "llm.int8": {"quantization_config": {"load_in_8bit": True}},
    "int4 by 32": {"quantization_config": {"quant_method": "quintet", "bits": 4, "group_size": 32}},
}


def loaded(cls: type[ModelCore], path: Path, here: World | None, **options: Any) -> ModelCore:
    return load(cls, ModelSource(path), None, {}, Options(world=here, **options))[0]


def compare(whole: ModelCore, parts: ModelCore, here: World) -> None:
    """Compare what a process has with the cut of the whole, to the bit, and then the logits."""
    shards = shards_of(whole, table_of(whole), here)
    own = parts.state_dict()
    names = held_names(whole, here)
    assert set(own) == names
    for name, tensor in whole.state_dict().items():
        if name not in names:
            continue
        wanted = shards[name].of(tensor)
        assert own[name].shape == wanted.shape, name
        assert torch.equal(own[name], wanted), name
    assert (parts.world, parts.tp_size) == (here, here.degrees.tp)
    compare_logits(whole, parts, 1e-5 if whole.dtype == torch.float32 else 0.05)


def compare_logits(whole: ModelCore, parts: ModelCore, bound: float) -> None:
    made = logits(parts)
    # Before the last stage there are none.
    if not made.is_meta:
        error = relative_error(made, logits(whole))
        assert error < bound, error


def held_names(whole: ModelCore, here: World) -> frozenset[str]:
    held = names_of_process(stages_to_run(whole, here), here)
    return frozenset(whole.state_dict()) if held is None else held


def compare_numbers(whole: ModelCore, parts: ModelCore, here: World) -> None:
    """Compare what a process has with the cut of the numbers of the whole, and then the logits."""
    with torch.device("meta"):
        plain = type(whole)(whole.config)
    shards = shards_of(plain, table_of(plain), here)
    own = {path: module for path, module in parts.named_modules() if isinstance(module, Quantized)}
    assert own
    names = held_names(plain, here)
    for path, module in whole.named_modules():
        if isinstance(module, Quantized):
            for name in module.matrices:
                if f"{path}.{name}" not in names:
                    continue
                wanted = shards[f"{path}.{name}"].of(module.decoded(name, torch.float32))
                assert torch.equal(own[path].decoded(name, torch.float32), wanted), path
    for name, tensor in whole.named_parameters():
        if name in names:
            assert torch.equal(parts.get_parameter(name), shards[name].of(tensor)), name
    noted = dict(vars(whole.config)["quantization_config"])
    if noted.get("bnb_4bit_use_double_quant"):
        noted["bnb_4bit_use_double_quant"] = False
    assert vars(parts.config)["quantization_config"] == noted
    # Kernels round what they multiply integers with.
    compare_logits(whole, parts, 1e-3)


def logits(model: ModelCore) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        made: Tensor = model(input_ids=torch.randint(1, 101, (2, 7)))[0]
    return made


def plain(name: str, path: Path, degrees: dict[str, int], options: dict[str, Any]) -> None:
    cls, here = family(name).cls("ForCausalLM"), world(**degrees)
    compare(loaded(cls, path, None, **options), loaded(cls, path, here, **options), here)


def quantised(name: str, path: Path, degrees: dict[str, int], options: dict[str, Any]) -> None:
    cls, here = family(name).cls("ForCausalLM"), world(**degrees)
    whole, parts = loaded(cls, path, None, **options), loaded(cls, path, here, **options)
    compare_numbers(whole, parts, here)


def refused(name: str, path: Path, degrees: dict[str, int], options: dict[str, Any]) -> str:
    cls, here = family(name).cls("ForCausalLM"), world(**degrees)
    with pytest.raises((InputError, RankFailedError)) as caught:
        loaded(cls, path, here, **options)
    return str(caught.value)


def in_memory(name: str, path: Path) -> None:
    """Load out of a state dict whose names are others; what is kept is no part of it."""
    cls, here = family(name).cls("ForCausalLM"), world(tp=2)
    whole = loaded(cls, path, None)
    state = {f"other.{key}": tensor for key, tensor in whole.state_dict().items()}
    parts = loaded(cls, path, here, state_dict=state, key_mapping={"^other\\.": ""})
    compare(whole, parts, here)
    nbytes = sum(t.untyped_storage().nbytes() for t in parts.parameters())
    assert nbytes == sum(t.nbytes for t in parts.parameters())


def fresh(name: str, path: Path, head: str, options: dict[str, Any], overrides: Any) -> None:
    """Draw alike what a checkpoint lacks, though each process was seeded in its own way."""
    cls, here = family(name).cls(head), world(tp=2)
    torch.manual_seed(7)
    with pytest.warns(NewHeadWarning):
        whole = load(cls, ModelSource(path), None, overrides, Options(**options))[0]
    torch.manual_seed(7 + dist.get_rank())
    with pytest.warns(NewHeadWarning):
        parts = load(cls, ModelSource(path), None, overrides, Options(world=here, **options))[0]
    compare(whole, parts, here)


def unlike(name: str, paths: list[Path]) -> str:
    """Let one process find a checkpoint that is none; return what this one says."""
    cls, here = family(name).cls("ForCausalLM"), world(tp=2)
    with pytest.raises(RankFailedError) as caught:
        loaded(cls, paths[dist.get_rank()], here)
    assert caught.value.rank == 1
    return str(caught.value)


def alike(name: str, path: Path) -> str:
    """Let all find a checkpoint that is none; return what this one says."""
    cls, here = family(name).cls("ForCausalLM"), world(tp=2)
    with pytest.raises(CheckpointError) as caught:
        loaded(cls, path, here)
    return str(caught.value)


def memory(path: Path, degrees: dict[str, int]) -> dict[str, int]:
    """Load, and return how many bytes were touched, are held, and were there at most."""
    cls, here = family("qwen2-moe").cls("ForCausalLM"), world(**degrees)
    file = path / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        # What was read stays to be seen.
        patch.setattr(MappedFile, "forget", lambda self, info: None)
        model = loaded(cls, path, here)
        logits(model)
        touched = resident(file)
    del model
    gc.collect()
    assert resident(file) == 0
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = loaded(cls, path, here)
    peak = status("VmHWM") - before
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"touched": touched, "held": held, "peak": peak}


def resident(file: Path) -> int:
    """Return how many bytes of a file are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) << 10


def with_adapter(base: Path, adapter: Path, sizes: dict[str, int]) -> None:
    """An adapter is put on no part of a model, and who tries is told what does."""
    say = "merge_and_unload"
    # Before anything is read.
    with pytest.raises(InputError, match=say):
        AutoModelForCausalLM.from_pretrained(adapter, distributed_config=sizes)
    parts = AutoModelForCausalLM.from_pretrained(base, distributed_config=sizes)
    before = set(parts.state_dict())
    with pytest.raises(InputError, match=say):
        parts.load_adapter(adapter)
    with pytest.raises(InputError, match=say):
        parts.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert parts.adapters is None
    assert set(parts.state_dict()) == before
    assert all(p.requires_grad for p in parts.parameters())
