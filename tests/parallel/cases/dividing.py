"""Programs that a launcher starts, as people write them."""

import json
import sys
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig as Theirs

from quintet import AutoModelForCausalLM, AutoTokenizer, DistributedConfig, demo_model, pipeline

# In bfloat16, too, each likeliest token is far ahead of the next (0.6).
PROMPT = "def add(a, b):"
# As people spell the same thing.
HOW: dict[str, dict[str, Any]] = {
    "device_map": {"device_map": "auto"},
    "tp_plan": {"tp_plan": "auto"},
    "tp_size": {"tp_size": 2},
    "config": {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)},
    "stages": {"distributed_config": {"pp_size": 2}},
    "theirs": {"distributed_config": Theirs(tp_size=2)},
}


def imported() -> bool:
    """Tell whether the process was forked from one that had imported what takes long."""
    return "parallel.preloaded" in sys.modules


def text_of(model: Any, prompt: str = PROMPT) -> str:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(made[0]))


def continues(spellings: tuple[str, ...]) -> None:
    """Print how many numbers are held and the text, of one model after the other."""
    torch.set_num_threads(1)
    found = {}
    for how in spellings:
        if how == "mesh":
            model: Any = _load(device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
        elif how == "pipeline":
            model = pipeline("text-generation", demo_model(), dtype=torch.float32).model
        else:
            model = _load(**HOW[how])
        found[how] = sum(p.numel() for p in model.parameters()), text_of(model)
    print(json.dumps(found))


def is_wrong(what: str) -> None:
    """Ask for what cannot be."""
    if what == "order":
        _load(device_mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("tp", "dp")))
    if what == "differs":
        model = _load(tp_plan="auto")
        text_of(model, f"{PROMPT} {model.world.rank}")
    _load(tp_size=3)


def _load(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model(), **options)
