"""A model of more bytes than this machine has memory, in int8: what loading and a token cost.

    python benchmarks/large.py write qwen1.5-moe /tmp/large     # 28.6 GB of random weights
    python benchmarks/large.py load /tmp/large                  # in int8, then a few tokens

Weights are random, names and shapes those of the release, an entry for each expert.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from quintet import AutoModelForCausalLM, DeepseekV2Config, PreTrainedConfig, Qwen2MoeConfig
from quintet.auto import family
from quintet.checkpoint import pieces, save_stream
from quintet.modeling.init_on_meta import init_on_meta


def geometry(name: str) -> PreTrainedConfig:
    """Return the configuration of a released model."""
    if name == "qwen1.5-moe":
        return Qwen2MoeConfig(dtype="bfloat16")
    return DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        q_lora_rank=None,
        kv_lora_rank=512,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        dtype="bfloat16",
    )


def write(name: str, directory: Path, shard: str) -> None:
    """Write random weights; a pool of them is drawn once and read from somewhere else each time."""
    config = geometry(name)
    model = init_on_meta(family(config.model_type).find("ForCausalLM"), config)
    config.architectures = [type(model).__name__]
    torch.manual_seed(0)
    sizes = {
        n: tuple(t.shape) for n, t in model.state_dict().items() if n not in model.tied_names()
    }
    pool = (torch.randn(2**26) * 0.02).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in sizes.items():
            for piece in pieces(name, shape, model.expert_stacks):
                count = torch.Size(piece.shape).numel()
                start = int(torch.randint(0, 2**24, ()))
                there = pool[start : start + count]
                whole = there.repeat(-(-count // len(there))) if len(there) < count else there
                values = whole[:count].view(piece.shape).clone()
                norm = piece.name.endswith("norm.weight")
                yield piece.name, values.abs() + 1 if norm else values

    started = time.perf_counter()
    texts = {"config.json": config.to_json_string()}
    save_stream(directory, tensors(), max_shard_size=shard, text_files=texts)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    print(f"{name}: {size:,} bytes in {time.perf_counter() - started:.0f} s")


def status(key: str) -> float:
    """Return a size of this process in GB, as the kernel counts it."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(key))) / 1e6


def load(directory: Path, quantize: str, tokens: int, prompt: int) -> None:
    """Load in fewer bits, write a few tokens, and say what it took."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, quantize=quantize)
    loaded = time.perf_counter()
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(
        f"{type(model).__name__} {quantize}: {model.num_parameters():,} parameters, "
        f"{held / 1e9:.2f} GB of weights, loaded in {loaded - started:.0f} s"
    )
    print(f"resident {status('VmRSS'):.2f} GB, at most {status('VmHWM'):.2f} GB", flush=True)
    ids = torch.arange(1, prompt + 1)[None]
    out = model.generate(ids, max_new_tokens=1, do_sample=False)
    first = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    done = time.perf_counter()
    print(
        f"first token after {first - loaded:.1f} s, then {tokens} tokens of a prompt of {prompt} "
        f"in {done - first:.1f} s: {out[0, prompt:].tolist()}"
    )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"at most {max(most, status('VmHWM')):.2f} GB")


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("write")
    first.add_argument("name", choices=("qwen1.5-moe", "v2-lite"))
    first.add_argument("directory", type=Path)
    first.add_argument("--shard", default="1GB")
    second = steps.add_parser("load")
    second.add_argument("directory", type=Path)
    second.add_argument("--quantize", default="int8")
    second.add_argument("--tokens", type=int, default=8)
    second.add_argument("--prompt", type=int, default=16)
    given = parser.parse_args()
    if given.step == "write":
        write(given.name, given.directory, given.shard)
    else:
        load(given.directory, given.quantize, given.tokens, given.prompt)


if __name__ == "__main__":
    main()
