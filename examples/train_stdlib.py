"""Train a demo model: a tiny DeepSeek-V3 on the source of Python's standard library.

    python examples/train_stdlib.py --out runs/demo

One command, from nothing but the Python it runs on: it collects the sources, trains a byte-level
BPE tokenizer, trains the model with its layer of multi-token prediction and balanced experts,
measures held-out bits per byte beside gzip and xz, and writes a checkpoint with its model card.
`--resume` goes on after an interruption. It is also the example of a training loop to copy from.
"""

import argparse
import ctypes
import gzip
import hashlib
import lzma
import math
import os
import platform
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from torch import Tensor

from quintet import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer
from quintet.modeling.balance import LoadBalancer

END = "<|endoftext|>"
# Generated tables, and what others installed.
SKIPPED = ("site-packages", "encodings", "__pycache__")
# Read as well, less and less of it: the model is for the modules themselves.
BESIDE = ("test", "tests", "idle_test", "pydoc_data")


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        until: the share of the training that is done when it ends.
        context: how many tokens a window has.
        mtp_weight: the weight of multi-token prediction; None without it.
    """

    until: float
    context: int
    mtp_weight: float | None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the sources themselves."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    context: int = 1024
    # Most of what can be learned is in short texts, which are cheaper; and what the prediction
    # layer learns from has to be there first. Its weights are those of the paper.
    phases: tuple[Phase, ...] = (Phase(0.45, 256, None), Phase(0.8, 512, 0.3), Phase(1, 1024, 0.1))
    tokens: int = 4096
    steps: int = 5000
    warmup: float = 0.03
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    # How far a router's bias moves in a step; not at all at the very end, as in the paper.
    bias_rate: float = 0.001
    bias_until: float = 0.95
    # The share of windows from beside the modules, at the start and at the end.
    beside: tuple[float, float] = (0.6, 0.1)
    seed: int = 20260
    threads: int = 1

    def phase(self, done: float) -> Phase:
        """Return the phase in which a share of the training is done."""
        return next((phase for phase in self.phases if done < phase.until), self.phases[-1])

    @property
    def mtp_from(self) -> float:
        """The share of the training that is done when the prediction layer is first trained."""
        starts = (0.0, *(phase.until for phase in self.phases))
        return next(at for at, phase in zip(starts, self.phases, strict=False) if phase.mtp_weight)

    def config(self, end: int) -> DeepseekV3Config:
        """Return the model's configuration."""
        return DeepseekV3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            moe_intermediate_size=self.moe_intermediate_size,
            n_routed_experts=self.n_routed_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=1,
            num_hidden_layers=self.num_hidden_layers,
            num_nextn_predict_layers=1,
            num_attention_heads=self.num_attention_heads,
            q_lora_rank=None,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
        )


@dataclass
class Sources:
    """The texts: modules to learn from, modules held out, and what lies beside the modules."""

    modules: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)


def collect(root: Path) -> Sources:
    """Read all sources; a module's path decides, one in twenty is held out."""
    found = Sources()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIPPED for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        lot = hashlib.sha256(relative.as_posix().encode()).digest()[0]
        if any(part in BESIDE for part in relative.parts):
            found.beside.append(text)
        else:
            (found.held_out if lot % 20 == 0 else found.modules).append(text)
    return found


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
    return torch.cat([torch.tensor([*tokenizer.encode(text).ids, end]) for text in texts])


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (arXiv:2502.16982), stacks of matrices at once.

    The last two axes of a parameter are a matrix, the others count matrices. Updates have the
    size of AdamW's.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "rows": None})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        alike = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).view(
                    -1, group["rows"] or p.shape[-2], p.shape[-1]
                )
                tall = update.shape[-2] > update.shape[-1]
                update = update.mT if tall else update
                alike[update.shape[1:]].append((p, group, update, tall))
        for shape, members in alike.items():
            made = (
                orthogonal(torch.cat([update for _, _, update, _ in members]))
                * 0.2
                * shape[1] ** 0.5
            )
            parts = made.split([len(update) for _, _, update, _ in members])
            for (p, group, _, tall), part in zip(members, parts, strict=True):
                part = part.mT if tall else part
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(part.reshape(p.shape), alpha=group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """Return roughly the nearest orthogonal matrices (N, O, I), O <= I, by Newton and Schulz."""
    x = x.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.float()


def make_optimizers(model: DeepseekV3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for the rest.

    Muon gets much farther in the same steps; docs/lab-notes.md has the comparison.
    """
    gates, matrices, others = [], [], []
    for name, p in model.named_parameters():
        inside = ".layers." in name and p.ndim > 1 and "mlp.gate." not in name
        (gates if "gate_up_proj" in name else matrices if inside else others).append(p)
    # A gate and what it gates are two matrices in one.
    groups = [{"params": matrices}, {"params": gates, "rows": recipe.moe_intermediate_size}]
    return [
        Muon(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate(done: float, recipe: Recipe) -> float:
    """Rise linearly, then fall linearly to nothing (arXiv:2502.15938)."""
    return recipe.learning_rate * min(done / recipe.warmup, (1 - done) / (1 - recipe.warmup))


@dataclass
class Progress:
    """How much of the training is done, counted in steps, or in minutes of the processor."""

    steps: int
    minutes: float | None
    step: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> float:
        """The share that is done, 0 to 1."""
        share = self.step / self.steps
        return share if self.minutes is None else min(1.0, self.seconds / 60 / self.minutes)


def batches(pools: tuple[Tensor, Tensor], recipe: Recipe, progress: Progress) -> Iterator[Tensor]:
    """Yield random windows of the two texts, (B, T), anew for each step of `progress`."""
    while True:
        # A generator of its own for each step: nothing to keep for those who resume.
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + progress.step)
        T = recipe.phase(progress.done).context
        first, last = recipe.beside
        share = first + (last - first) * progress.done
        rows = []
        for draw in torch.rand(recipe.tokens // T, generator=generator).tolist():
            ids = pools[1 if draw < share else 0]
            start = int(torch.randint(len(ids) - T, (), generator=generator))
            rows.append(ids[start : start + T])
        yield torch.stack(rows)


def train(
    model: DeepseekV3ForCausalLM,
    pools: tuple[Tensor, Tensor],
    recipe: Recipe,
    progress: Progress,
    saved: Path,
) -> None:
    """Take optimiser steps, each of `recipe.tokens` tokens, and save them every five minutes."""
    optimizers = make_optimizers(model, recipe)
    if progress.step:
        for optimizer, state in zip(optimizers, torch.load(saved)["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    model.train()
    source = batches(pools, recipe, progress)
    averages: dict[str, float] = {}
    last_saved = time.monotonic()
    with LoadBalancer(model, recipe.bias_rate) as balancer:
        while progress.done < 1:
            started, done = time.process_time(), progress.done
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, recipe)
            batch = next(source)
            weight = recipe.phase(done).mtp_weight
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(batch, labels=batch, use_cache=False, mtp_loss_weight=weight)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            violations = balancer.violations().values()
            balancer.rate = recipe.bias_rate if done < recipe.bias_until else 0.0
            balancer.step()
            progress.step += 1
            progress.seconds += time.process_time() - started

            seen = {"MaxVio": sum(violations) / len(violations)}
            if out.mtp_loss is None:
                seen["loss"] = out.loss.item()
            else:
                seen["mtp"] = out.mtp_loss.item()
                seen["loss"] = out.loss.item() - weight * seen["mtp"]
            for name, value in seen.items():
                averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
            if progress.step % 50 == 1 or progress.done >= 1:
                told = "  ".join(f"{name} {value:.4f}" for name, value in averages.items())
                speed = progress.step * recipe.tokens / progress.seconds
                print(
                    f"{progress.done:6.1%}  step {progress.step:5}  {told}  {speed:,.0f} tokens/s",
                    flush=True,
                )
            if time.monotonic() - last_saved > 300:
                save_progress(saved, model, optimizers, progress)
                last_saved = time.monotonic()
    save_progress(saved, model, optimizers, progress)


def save_progress(
    path: Path,
    model: DeepseekV3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write what `--resume` needs, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": progress.step,
        "seconds": progress.seconds,
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@torch.no_grad()
def held_out_bits(model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
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


@torch.no_grad()
def held_out_agreement(
    model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, texts: list[str]
) -> float:
    """Return how often multi-token prediction names the token the model itself would choose."""
    model.eval()
    agreed = total = 0
    context = model.config.max_position_embeddings
    for text in texts:
        for window in torch.tensor(tokenizer.encode(text).ids).split(context):
            if len(window) < 3:
                continue
            out = model(window[None], use_cache=False, output_mtp_logits=True)
            ahead, main = out.mtp_logits[0][0, :-2].argmax(-1), out.logits[0, 1:-1].argmax(-1)
            agreed += int((ahead == main).sum())
            total += len(main)
    return agreed / total


CARD = """\
---
license: apache-2.0
language: [code]
tags: [quintet, deepseek_v3, demo]
---
# The demo model of Quintet

A tiny DeepSeek-V3 that writes text that looks like Python. It is here so that the package has
something real to run before any download; it knows no facts and its code does not work.

| | |
|---|---|
| architecture | DeepSeek-V3, {layers} layers, width {width}, {heads} heads over a latent of \
{rank}, {experts} experts of which {active} are active beside a shared one, in all layers but the \
first; one layer of multi-token prediction; tied embeddings |
| parameters | {parameters:,}, stored in bfloat16; {active_parameters:,} of the \
{main_parameters:,} without the prediction layer are active for a token |
| tokenizer | byte-level BPE, {vocab:,} tokens, trained on the modules |
| context | {context} tokens |
| data | the .py files of the standard library of Python {python}, without generated tables and \
installed packages: {train_files} modules, {train_bytes:,} bytes, {train_tokens:,} tokens (SHA-256 \
of all of it `{digest}`), and {beside_files} files of its tests, {beside_tokens:,} tokens, \
from which {first:.0%} of the windows come at first and {last:.0%} at last; PSF licence |
| held out | {held_files} files, {held_bytes:,} bytes, chosen by the hash of their path |
| training | {steps:,} steps of {batch:,} tokens; {phases}; Muon and AdamW, peak learning rate \
{rate:g}, falling to nothing; seed {seed}, bfloat16 autocast |
| balance | by bias alone, {bias_rate} a step; MaxVio over the held-out files {violation:.2f} on \
average, {worst:.2f} in the worst layer |
| time | {minutes:.0f} minutes on {threads} thread(s) of a {machine}, torch {torch} |

Bits per byte on the held-out files, all of them together:

| | bits per byte |
|---|---|
| this model, as stored | **{bpb:.3f}** |
| `xz -9`, one stream of all files | {xz:.3f} |
| `gzip -9`, one stream of all files | {gzip:.3f} |

The model starts every file from nothing and pays for each byte; the compressors see the files as
one stream, which helps them. The prediction layer names the model's own choice of the token after
the next for {agreement:.1%} of the held-out tokens; it was trained from {mtp_from:.0%} of the
training on.

The Qwen2 that was packaged before needed 1.078 bits per byte of the same files. The two were not
given the same to read: this model has the tests of the library as well. Made by
`python examples/train_stdlib.py{asked}`.
"""


def active_parameters(model: DeepseekV3ForCausalLM) -> tuple[int, int]:
    """Return how many parameters of the main run a token goes through, and how many there are."""
    layers = model.model.layers[: model.config.num_hidden_layers]
    main = sum(p.numel() for p in model.model.embed_tokens.parameters()) + sum(
        p.numel() for p in (*layers.parameters(), *model.model.norm.parameters())
    )
    routed = sum(p.numel() for n, p in layers.named_parameters() if ".experts." in n)
    share = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
    return main - round(routed * share), main


def keep_memory() -> None:
    """Tell glibc to keep freed memory: handing it back in each step costs a fifth of the time."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
        libc.mallopt(trim_threshold, most)
        libc.mallopt(mmap_threshold, 2**30)


def main() -> None:
    """Collect, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, help="so long instead, by the processor's clock")
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--files", type=int, help="use that many files only, to try it out")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step")
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, threads=options.threads)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)

    found = collect(Path(sysconfig.get_paths()["stdlib"]))
    if options.files is not None:
        n = options.files
        # Measuring a file takes as long as many steps.
        held_out = [text[:10_000] for text in found.held_out[: max(1, n // 20)]]
        found = Sources(found.modules[:n], held_out, found.beside[:n])
    tokenizer = train_tokenizer(found.modules, recipe.vocab_size)
    modules, beside = encode(tokenizer, found.modules), encode(tokenizer, found.beside)
    train_bytes = sum(len(text.encode()) for text in found.modules)
    print(
        f"{len(found.modules)} modules, {train_bytes:,} bytes, {len(modules):,} tokens; "
        f"{len(found.beside)} files beside, {len(beside):,} tokens",
        flush=True,
    )

    end = tokenizer.token_to_id(END)
    model = DeepseekV3ForCausalLM(recipe.config(end))
    active, in_main = active_parameters(model)
    print(f"{model.num_parameters():,} parameters, {active:,} of them active", flush=True)
    saved = options.out / "training.pt"
    progress = Progress(recipe.steps, options.minutes)
    if options.resume:
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        progress.step, progress.seconds = state["step"], state["seconds"]
        print(f"going on from step {progress.step}", flush=True)
    keep_memory()
    train(model, (modules, beside), recipe, progress, saved)

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

    stream = "".join(found.held_out).encode()
    model = model.float()
    with LoadBalancer(model, rate=0.0) as balancer:
        bits = held_out_bits(model, tokenizer, found.held_out)
        violations = list(balancer.violations().values())
    card = CARD.format(
        layers=recipe.num_hidden_layers,
        width=recipe.hidden_size,
        heads=recipe.num_attention_heads,
        rank=recipe.kv_lora_rank,
        experts=recipe.n_routed_experts,
        active=recipe.num_experts_per_tok,
        parameters=model.num_parameters(),
        active_parameters=active,
        main_parameters=in_main,
        vocab=recipe.vocab_size,
        context=recipe.context,
        python=platform.python_version(),
        train_files=len(found.modules),
        train_bytes=train_bytes,
        train_tokens=len(modules),
        beside_files=len(found.beside),
        beside_tokens=len(beside),
        first=recipe.beside[0],
        last=recipe.beside[1],
        digest=hashlib.sha256("".join(found.modules).encode()).hexdigest()[:16],
        held_files=len(found.held_out),
        held_bytes=len(stream),
        steps=progress.step,
        batch=recipe.tokens,
        phases="; ".join(
            f"up to {p.until:.0%} in windows of {p.context}, multi-token prediction weighing "
            f"{p.mtp_weight or 0}"
            for p in recipe.phases
        ),
        rate=recipe.learning_rate,
        bias_rate=recipe.bias_rate,
        violation=sum(violations) / len(violations),
        worst=max(violations),
        seed=recipe.seed,
        minutes=progress.seconds / 60,
        threads=recipe.threads,
        machine=platform.processor() or platform.machine(),
        torch=torch.__version__,
        bpb=bits / len(stream),
        xz=8 * len(lzma.compress(stream, preset=9)) / len(stream),
        gzip=8 * len(gzip.compress(stream, 9)) / len(stream),
        mtp_from=recipe.mtp_from,
        asked="" if options.minutes is None else f" --minutes {options.minutes:g}",
        agreement=held_out_agreement(model, tokenizer, found.held_out),
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
