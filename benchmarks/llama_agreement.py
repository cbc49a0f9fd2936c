"""What llama.cpp makes of our files: the logits of small models that we wrote, and its perplexity.

    python -m benchmarks.llama_agreement small
    python -m benchmarks.llama_agreement perplexity smollm2.gguf [FILE ...]

`small` writes a model of each architecture with random weights, in each type, lets llama.cpp read
it, and compares what both make of the same ids. `perplexity` compares both on files with a
tokenizer, over the texts of `benchmarks.perplexity`.
"""

import ctypes
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from benchmarks.perplexity import TEXTS
from quintet import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    Qwen2Config,
    Qwen2MoeConfig,
)
from quintet.exporting import GGUF_TYPES, export_gguf

CONFIGS: dict[str, Any] = {
    "Qwen2": Qwen2Config,
    "Qwen2Moe": Qwen2MoeConfig,
    "DeepseekV2": DeepseekV2Config,
    "DeepseekV3": DeepseekV3Config,
}
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 96},
    ),
    "deepseek-v2-lite": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "num_hidden_layers": 27}),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **LATENT, "q_lora_rank": 64, "topk_method": "group_limited_greedy", "n_group": 4,
            "topk_group": 2, "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek-v2, no groups": ("DeepseekV2", {**LATENT, "q_lora_rank": 64}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **LATENT, "q_lora_rank": 64, "n_group": 4, "topk_group": 2,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 2.5,
        },
    ),
    "deepseek-v3, yarn": (
        "DeepseekV3",
        {
            **LATENT, "q_lora_rank": 64, "n_group": 4, "topk_group": 2,
            "num_nextn_predict_layers": 0,
            "rope_scaling": {
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
}  # fmt: skip


class Reader:
    """A file as llama.cpp reads it."""

    def __init__(self, path: Path) -> None:
        began = time.perf_counter()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        self.seconds = time.perf_counter() - began
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits (T, V) of a text."""
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = -(-len(ids) // 256) * 256
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        context = llama_cpp.llama_init_from_model(self.model, options)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = True
            if (code := llama_cpp.llama_decode(context, batch)) != 0:
                raise RuntimeError(f"llama_decode returned {code}")
            found = llama_cpp.llama_get_logits(context)
            array = np.ctypeslib.as_array(found, (len(ids), self.size))
            return torch.from_numpy(array.copy())
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


@torch.no_grad()
def small(only: str = "") -> None:
    """Print how far both are apart on models of random weights, in units of the logits' spread."""
    ids = torch.randint(0, 320, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    print("model                  type   median apart   argmax equal")
    for name, (family, changes) in MODELS.items():
        if only not in name:
            continue
        for kind in GGUF_TYPES:
            ours, theirs = _both(family, {**SIZES, **changes}, kind, ids)
            apart = ((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).median().item()
            same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
            print(f"{name:22} {kind:6} {apart:12.5f} {same:14.3f}", flush=True)


def _both(family: str, values: dict[str, Any], kind: str, ids: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family](**values)).eval()
    for one in model.parameters():
        if one.ndim > 1:
            # Logits of a spread that says something: weights twice as wide as at initialisation.
            one.mul_(2.0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no tokenizer")
        model.save_pretrained(folder)
        path = Path(folder, "model.gguf")
        export_gguf(folder, path, dtype=kind)
        again = AutoModelForCausalLM.from_pretrained(path, quantize="none", dtype="float32")
        return again(torch.tensor([ids])).logits[0].float(), Reader(path).logits(ids)


@torch.no_grad()
def perplexity(*files: str) -> None:
    """Print the perplexity of both, of the same ids, and how long each takes to load."""
    for file in files:
        reader = Reader(Path(file))
        tokenizer = AutoTokenizer.from_pretrained(file)
        began = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(file)
        loaded = time.perf_counter() - began
        print(f"{Path(file).name}: loaded in {loaded:.2f} s, by llama.cpp in {reader.seconds:.2f}")
        for text in TEXTS:
            written = Path(__file__).with_name(text).read_text(encoding="utf-8")
            ids = tokenizer(written)["input_ids"]
            ours = model(torch.tensor([ids])).logits[0].float()
            theirs = reader.logits(ids)
            same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
            print(
                f"  {text}: {_perplexity(ours, ids):.3f}, "
                f"llama.cpp {_perplexity(theirs, ids):.3f}, argmax equal {same:.3f}",
                flush=True,
            )


def _perplexity(logits: Tensor, ids: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    return math.exp(loss.item())


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(_level: int, _text: bytes, _data: Any) -> None:
    pass


if __name__ == "__main__":
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    {"small": small, "perplexity": perplexity}[sys.argv[1]](*sys.argv[2:])
