"""What a cache of fewer bits saves, and what it costs.

    python benchmarks/cache_bits.py bytes      # caches at the geometry of released models
    python benchmarks/cache_bits.py accuracy   # the packaged model on text it was not trained on
    python benchmarks/cache_bits.py speed      # decoding with DeepSeek-V2-Lite's attention

Bytes are those that the cache objects hold, scales included, after storing tokens in them.
"""

import argparse
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

import quintet
from quintet import Cache, DynamicCache, PreTrainedConfig, QuantizedCache
from quintet.training.scoring import predictions

TOKENS = 128
BF16 = torch.bfloat16
KINDS: dict[str, Callable[[PreTrainedConfig], Cache]] = {
    "bfloat16": DynamicCache,
    "8 bits": lambda config: QuantizedCache(config, 8),
    "6 bits": lambda config: QuantizedCache(config, 6),
    "4 bits": lambda config: QuantizedCache(config, 4),
}


def latent(layers: int) -> dict[str, int]:
    """Return a DeepSeek geometry; only what the cache depends on matters."""
    return {"num_hidden_layers": layers, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def bytes_per_token(config: PreTrainedConfig, cache: Cache, shapes: list[tuple[int, int]]) -> float:
    """Fill a cache with keys and values of (heads, size) and return the bytes of a token."""
    span = cache.segment(1, TOKENS, torch.device("cpu"), None)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(1, heads, TOKENS, size).to(BF16) for heads, size in shapes)
        cache.update(keys, values, layer, span)
    cache.advance(span)
    return cache.nbytes / TOKENS


def show_bytes() -> None:
    """Print the table of bytes a token beside the cache of DeepSeek 67B."""
    dense = quintet.Qwen2Config(num_hidden_layers=95)
    reference = bytes_per_token(dense, DynamicCache(dense), [(8, 128), (8, 128)])
    print(f"DeepSeek 67B: 95 layers, 8 heads of 128, bfloat16: {reference:,.0f} bytes a token\n")
    print("| | " + " | ".join(KINDS) + " |\n|---" + "|---" * len(KINDS) + "|")
    models = {
        "DeepSeek-V2": quintet.DeepseekV2Config(**latent(60)),
        "DeepSeek-V3": quintet.DeepseekV3Config(**latent(61)),
    }
    for name, config in models.items():
        cells = []
        for make in KINDS.values():
            held = bytes_per_token(config, make(config), [(1, 512), (1, 64)])
            cells.append(f"{held:,.0f} B, {1 - held / reference:.1%} less")
        print(f"| {name} | " + " | ".join(cells) + " |")


@torch.no_grad()
def show_accuracy(files: int) -> None:
    """Print held-out bits a byte and the error of logits, of the packaged model."""
    # The script that trained the model knows which files it held out.
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_stdlib import END, collect

    root = Path(quintet.__file__).parent / "demo"
    model = quintet.AutoModelForCausalLM.from_pretrained(root, dtype="float32")
    tokenizer = quintet.AutoTokenizer.from_pretrained(root)
    end = tokenizer.convert_tokens_to_ids(END)
    texts = collect(Path(sysconfig.get_paths()["stdlib"])).held_out[:files]
    context = model.config.max_position_embeddings
    rows = []
    for text in texts:
        ids = [end, *tokenizer(text)["input_ids"]]
        for i in range(0, len(ids), context):
            window = torch.tensor([ids[i : i + context]])
            if window.shape[1] > 1:
                rows.append(window)
    count = sum(len(text.encode()) for text in texts)
    exact: list[torch.Tensor] = []
    print(f"{type(model).__name__}, {len(texts)} files, {count:,} bytes\n")
    print("| cache | bits a byte | error of the logits (rms, relative) | another token |")
    print("|---|---|---|---|")
    for kind, make in KINDS.items():
        bits = error = size = 0.0
        other = total = 0
        for i, window in enumerate(rows):
            cache = DynamicCache(model.config) if kind == "bfloat16" else make(model.config)
            pieces = list(
                predictions(model, window[0], context, past_key_values=cache, use_cache=True)
            )
            logits = torch.cat([piece.logits for piece in pieces])
            if kind == "bfloat16":
                exact.append(logits)
            bits += sum(piece.bits().sum().item() for piece in pieces)
            error += (logits - exact[i]).square().sum().item()
            size += exact[i].square().sum().item()
            other += int((logits.argmax(-1) != exact[i].argmax(-1)).sum())
            total += len(logits)
        label = "as computed (float32)" if kind == "bfloat16" else kind
        off = math.sqrt(error / size)
        print(f"| {label} | {bits / count:.4f} | {off:.2%} | {other / total:.2%} |")


@torch.no_grad()
def show_speed(contexts: list[int], repeats: int) -> None:
    """Print milliseconds a token of two decoder layers of DeepSeek-V2-Lite, kinds in turn."""
    config = quintet.DeepseekV2Config(
        **latent(2),
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=2048,
        first_k_dense_replace=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=max(contexts) + 64,
    )
    model = quintet.DeepseekV2ForCausalLM(config).to(BF16).eval()
    token = torch.tensor([[5]])
    print("| context | " + " | ".join(KINDS) + " |\n|---" + "|---" * len(KINDS) + "|")
    for context in contexts:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        caches = {kind: make(config) for kind, make in KINDS.items()}
        for cache in caches.values():
            span = cache.segment(1, context, torch.device("cpu"), None)
            for layer in range(config.num_hidden_layers):
                c_kv, k_pe = (torch.randn(1, 1, context, size).to(BF16) for size in (512, 64))
                cache.update(c_kv, k_pe, layer, span)
            cache.advance(span)
            model(token, past_key_values=cache)
        for _ in range(repeats):
            for kind, cache in caches.items():
                start = time.perf_counter()
                model(token, past_key_values=cache)
                times[kind].append(time.perf_counter() - start)
        cells = [f"{statistics.median(times[kind]) * 1e3:.2f} ms" for kind in KINDS]
        print(f"| {context:,} | " + " | ".join(cells) + " |")


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bytes", "accuracy", "speed"])
    parser.add_argument("--files", type=int, default=8, help="held-out files (accuracy)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    if options.what == "bytes":
        show_bytes()
    elif options.what == "accuracy":
        show_accuracy(options.files)
    else:
        show_speed(options.contexts, options.repeats)


if __name__ == "__main__":
    main()
