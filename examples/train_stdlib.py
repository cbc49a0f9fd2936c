"""Train the packaged demo model: a tiny Qwen2 on the source of Python's standard library.

    python examples/train_stdlib.py --out runs/demo

One command, from nothing but the Python it runs on: it collects the sources, trains a byte-level
BPE tokenizer, trains the model, measures held-out bits per byte beside gzip and xz, and writes a
checkpoint with its model card. It is also the example of a training loop to copy from.
"""

import argparse
import gzip
import hashlib
import lzma
import math
import platform
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from torch import Tensor

from quintet import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END = "<|endoftext|>"
# Not prose or code to learn from: tests, generated tables, and what others installed.
SKIPPED = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the sources themselves."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    context: int = 512
    batch: int = 8
    steps: int = 4500
    warmup: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    optimizer: str = "muon"
    seed: int = 20260
    threads: int = 1


def collect(root: Path) -> tuple[list[str], list[str]]:
    """Return the training and the held-out sources; the path decides, one in twenty is kept."""
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        lot = hashlib.sha256(relative.as_posix().encode()).digest()[0]
        (held_out if lot % 20 == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's pipeline."""
    tokenizer = Qwen2Tokenizer(vocab={END: 0}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return all texts as one row of ids, each closed by the end token."""
    end = tokenizer.token_to_id(END)
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, end)]
    return torch.tensor(ids)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rise linearly, then fall to a twentieth along a cosine."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def make_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest, or AdamW for all.

    Muon (orthogonalised momentum) gets much farther in the same steps; docs/lab-notes.md has the
    comparison.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    plain = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    decay = recipe.weight_decay
    if recipe.optimizer == "muon":
        return [
            torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            plain,
        ]
    return [torch.optim.AdamW(matrices, betas=(0.9, 0.98), weight_decay=decay, fused=True), plain]


def train(model: Qwen2ForCausalLM, ids: Tensor, recipe: Recipe) -> None:
    """Take optimiser steps on random windows of the text."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizers = make_optimizers(model, recipe)
    windows = torch.arange(recipe.context)
    started = time.perf_counter()
    average = 0.0
    model.train()
    for step in range(recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
        starts = torch.randint(len(ids) - recipe.context, (recipe.batch,), generator=generator)
        batch = ids[starts[:, None] + windows]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0 or step + 1 == recipe.steps:
            speed = (step + 1) * batch.numel() / (time.perf_counter() - started)
            print(f"step {step:5}  loss {average:.4f}  {speed:,.0f} tokens/s", flush=True)


@torch.no_grad()
def held_out_bits(model: Qwen2ForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return the bits the model needs for all texts, each alone and from its first token on.

    Windows overlap by half, and a token is charged where it has the most context.
    """
    model.eval()
    end = tokenizer.token_to_id(END)
    context = model.config.max_position_embeddings
    bits = 0.0
    for text in texts:
        ids = torch.tensor([end, *tokenizer.encode(text).ids])
        done = 1
        while done < len(ids):
            start = 0 if done == 1 else done - context // 2
            stop = min(start + context, len(ids))
            window = ids[start:stop][None]
            log_p = model(window[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            picked = log_p.gather(-1, window[:, 1:, None])[0, done - start - 1 :, 0]
            bits -= picked.sum().item() / math.log(2)
            done = stop
    return bits


CARD = """\
---
license: apache-2.0
language: [code]
tags: [quintet, qwen2, demo]
---
# The demo model of Quintet

A tiny Qwen2 that writes text that looks like Python. It is here so that the package has something
real to run before any download; it knows no facts and its code does not work.

| | |
|---|---|
| architecture | Qwen2, {layers} layers, width {width}, {heads} heads over {kv_heads} \
key-value heads, tied embeddings |
| parameters | {parameters:,}, stored in bfloat16 |
| tokenizer | byte-level BPE, {vocab:,} tokens, trained on the same text |
| context | {context} tokens |
| data | the .py files of the standard library of Python {python}, without tests, generated tables \
and installed packages: {train_files} files, {train_bytes:,} bytes, {train_tokens:,} tokens \
(SHA-256 of all of it `{digest}`); PSF licence |
| held out | {held_files} files, {held_bytes:,} bytes, chosen by the hash of their path |
| training | {steps:,} steps of {batch} × {context} tokens ({epochs:.1f} passes), Muon and AdamW, \
peak learning rate {rate:g}, seed {seed}, bfloat16 autocast |
| time | {minutes:.0f} minutes on {threads} thread(s) of a {machine}, torch {torch} |

Bits per byte on the held-out files, all of them together:

| | bits per byte |
|---|---|
| this model, as stored | **{bpb:.3f}** |
| `xz -9`, one stream of all files | {xz:.3f} |
| `gzip -9`, one stream of all files | {gzip:.3f} |

The model starts every file from nothing and pays for each byte; the compressors see the files as
one stream, which helps them. Made by `python examples/train_stdlib.py`.
"""


def main() -> None:
    """Collect, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default=Recipe.optimizer)
    parser.add_argument("--files", type=int, help="use that many files only, to try it out")
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, threads=options.threads, optimizer=options.optimizer)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    texts, held_out = collect(Path(sysconfig.get_paths()["stdlib"]))
    if options.files is not None:
        texts, held_out = texts[: options.files], held_out[: max(1, options.files // 20)]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    ids = encode(tokenizer, texts)
    train_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} files, {train_bytes:,} bytes, {len(ids):,} tokens", flush=True)

    end = tokenizer.token_to_id(END)
    config = Qwen2Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        eos_token_id=end,
    )
    model = Qwen2ForCausalLM(config)
    print(f"{model.num_parameters():,} parameters", flush=True)
    started = time.perf_counter()
    train(model, ids, recipe)
    minutes = (time.perf_counter() - started) / 60

    model = model.to(torch.bfloat16)
    model.generation_config = model.generation_config.replace(
        pad_token_id=end, do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05
    )
    model.save_pretrained(options.out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END,
        pad_token=END,
        unk_token=None,
        model_max_length=recipe.context,
    )
    fast.save_pretrained(options.out)

    stream = "".join(held_out).encode()
    bits = held_out_bits(model.float(), tokenizer, held_out)
    card = CARD.format(
        layers=recipe.num_hidden_layers,
        width=recipe.hidden_size,
        heads=recipe.num_attention_heads,
        kv_heads=recipe.num_key_value_heads,
        parameters=model.num_parameters(),
        vocab=recipe.vocab_size,
        context=recipe.context,
        python=platform.python_version(),
        train_files=len(texts),
        train_bytes=train_bytes,
        train_tokens=len(ids),
        digest=hashlib.sha256("".join(texts).encode()).hexdigest()[:16],
        held_files=len(held_out),
        held_bytes=len(stream),
        steps=recipe.steps,
        batch=recipe.batch,
        epochs=recipe.steps * recipe.batch * recipe.context / len(ids),
        rate=recipe.learning_rate,
        seed=recipe.seed,
        minutes=minutes,
        threads=recipe.threads,
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__,
        bpb=bits / len(stream),
        xz=8 * len(lzma.compress(stream, preset=9)) / len(stream),
        gzip=8 * len(gzip.compress(stream, 9)) / len(stream),
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
