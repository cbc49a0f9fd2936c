"""What is planned, against the memory that processes really take.

    python -m benchmarks.planned [held] [trained]

Each model is made in a process of its own, of random numbers, with the shapes of a released one cut
to a few layers. Memory is what the system says that the process has more of than before (RssAnon).
"""

import argparse
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from quintet.auto import AutoModelForCausalLM
from quintet.configuration import PreTrainedConfig
from quintet.measurement.geometries import geometry
from quintet.measurement.synthetic import random_model
from quintet.planning.devices import device
from quintet.planning.inference import Workload, footprint
from quintet.planning.plans import described
from quintet.planning.training import Training, training_footprint
from quintet.planning.world import Split

__all__ = ["main"]

# Geometries, cut so that a machine that does other things too has room for them.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {},
    "deepseek-v2-lite-6l": {"num_hidden_layers": 3},
    "qwen1.5-moe-a2.7b-6l": {"num_hidden_layers": 3},
    "zamba2-1.2b": {"num_hidden_layers": 12},
    "deepseek-v3-2l-64e": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1},
}
TRAINED: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {"num_hidden_layers": 2, "vocab_size": 16384},
    "deepseek-v2-lite-6l": {"num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 16384},
    "qwen1.5-moe-a2.7b-6l": {"num_hidden_layers": 2, "num_experts": 8, "vocab_size": 16384},
    "zamba2-1.2b": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "deepseek-v3-2l-64e": {
        **{"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "vocab_size": 8192},
        "hidden_size": 2048,
        **{"intermediate_size": 4096, "num_attention_heads": 16},
    },
}
PROMPT = 1024


def resident() -> int:
    """Return the bytes of this process that no file has."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def config_of(name: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """Return a geometry's configuration, cut."""
    values = {**geometry(name).values, **changes}
    if name.startswith("zamba2"):
        kinds = changes.get("layers_block_type") or values["layers_block_type"]
        values["layers_block_type"] = kinds[: values["num_hidden_layers"]]
    return type(geometry(name).config())(**values)


def held(name: str) -> dict[str, Any]:
    """Compare weights and cache in bfloat16."""
    config = config_of(name, MODELS[name])
    planned = footprint(
        described(config, device("cpu"))[0], Split(), Workload(PROMPT, step_tokens=PROMPT)
    )
    random_model(_tiny(config), torch.bfloat16)
    before = resident()
    model = random_model(config, torch.bfloat16)
    gc.collect()
    weights = resident() - before
    with torch.no_grad():
        cache = model(torch.ones(1, PROMPT, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(
        tensor.nbytes
        for slot in cache.layers
        if slot is not None
        for tensor in slot.content(PROMPT)
    ) + sum(slot.nbytes for slot in cache.states if slot is not None)
    return {
        "weights": [planned.weights, weights],
        "cache": [planned.cache, kept],
    }


def trained(name: str) -> dict[str, Any]:
    """Compare weights, gradients and AdamW's state in float32."""
    config = config_of(name, TRAINED[name])
    work = Training(16, rows=1, itemsize=4, kernels=True)
    memory = training_footprint(described(config, device("cpu"))[0], Split(), work)
    planned = memory.weights + memory.gradients + memory.optimizer
    _step(_tiny(config))
    gc.collect()
    before = resident()
    kept = _step(config)
    gc.collect()
    found = resident() - before
    del kept
    return {"training": [planned, found]}


def _step(config: PreTrainedConfig) -> Any:
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(1, 16, dtype=torch.long)).logits.float().mean()
    # All experts learn, as in a batch that is large enough.
    (loss + sum(p.float().mean() for p in model.parameters())).backward()
    optimizer.step()
    return model, optimizer


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the smallest of the family, which is run first so that libraries are loaded."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    if config.model_type == "zamba2":
        small |= {"num_attention_heads": 2, "n_mamba_heads": 2}
    return type(config)(vocab_size=64, **small, **_few(config))


def _few(config: PreTrainedConfig) -> dict[str, Any]:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return {} if config.model_type == "zamba2" else heads


def main(arguments: list[str] | None = None) -> None:
    """Measure each model in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("what", nargs="*", choices=["held", "trained", []], default=[])
    given = parser.parse_args(arguments)
    if given.one:
        what, name = given.one
        print(json.dumps({"held": held, "trained": trained}[what](name)))
        return
    print("| model | | planned MB | measured MB | off |\n|---|---|---|---|---|")
    for what, models in (("held", MODELS), ("trained", TRAINED)):
        if given.what and what not in given.what:
            continue
        for name in models:
            command = [sys.executable, "-m", "benchmarks.planned", "--one", what, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for part, (planned, found) in json.loads(done.stdout.splitlines()[-1]).items():
                off = f"{planned / found - 1:+.1%}"
                print(f"| {name} | {part} | {planned / 1e6:,.1f} | {found / 1e6:,.1f} | {off} |")


if __name__ == "__main__":
    main()
