"""Loading in fewer bits: the most memory is what the model needs, a shard, and no stack twice."""

import os
from pathlib import Path

import pytest

from forking import Forks
from quintet import Qwen2MoeConfig, Qwen2MoeForCausalLM

# Large enough to stand out: stacks of 151 MB in 16 bits, in shards of 20 MB.
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "moe_intermediate_size": 1536,
    "shared_expert_intermediate_size": 512,
}
PROGRAM = """
import sys
from pathlib import Path
import torch
from quintet import Qwen2MoeForCausalLM
from quintet.quantization import QuantizedExperts

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
# What quantising needs of code and of the allocator is there before.
torch.ones(64, 64).bfloat16().float().div(3).round().to(torch.int8)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = Qwen2MoeForCausalLM.from_pretrained(sys.argv[1], quantize=sys.argv[2])
held = sum(t.nbytes for t in model.state_dict().values())
print(held, peak() - before)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    model = Qwen2MoeForCausalLM.from_config(Qwen2MoeConfig(**CONFIG), dtype="bfloat16")
    model.save_pretrained(root, max_shard_size="20MB")
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_no_stack_is_there_in_16_bits(quantize: str, saved: Path, forks: Forks) -> None:
    size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    done = forks.run(PROGRAM, saved, quantize, environment=os.environ)
    assert done.returncode == 0, done.stderr
    held, most = map(int, done.stdout.split())
    assert held < size * 0.6
    # A stack in 16 bits beside the model would be 151 MB more.
    assert most <= held + 20e6 + 60e6
