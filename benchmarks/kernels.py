"""Kernels beside the PyTorch they stand for, at the shapes of released models.

    python benchmarks/kernels.py attention latent experts mamba2

Both in turn, medians of 21, all threads torch has.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from quintet.kernels import report
from quintet.kernels.attention import attend
from quintet.kernels.grouped import grouped_silu_experts
from quintet.kernels.latent import attend_latents
from quintet.kernels.ssm import MixerWeights
from quintet.ops.mamba2 import mix, mix_stepwise
from quintet.ops.masks import AttentionMask
from quintet.ops.mla import absorbed
from quintet.ops.moe import looped_experts

BF16 = torch.bfloat16


def in_turn(*runs: Callable[[], object], repeats: int = 21) -> list[float]:
    """Return the median seconds of each, taken in turn after one that does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def attention() -> None:
    """Compare the attention of a prompt with torch's fused one; values padded where it asks."""
    print("| attention of a prompt | torch | ours | |\n|---|---|---|---|")
    shapes = {
        "Qwen2-0.5B": (14, 2, 64, 64),
        "Zamba2-1.2B": (32, 32, 128, 128),
        "DeepSeek-V2-Lite": (16, 16, 192, 128),
    }
    for name, (H, K, D, Dv) in shapes.items():
        for T in (512, 4096):
            q, k, v = (
                torch.randn(1, T, heads, size).to(BF16).transpose(1, 2)
                for heads, size in ((H, D), (K, D), (K, Dv))
            )
            wide = F.pad(v, (0, D - Dv))
            flops = T * T * H * (D + Dv)  # half of what is not causal

            theirs, ours = in_turn(
                partial(
                    F.scaled_dot_product_attention, q, k, wide, is_causal=True, enable_gqa=H != K
                ),
                partial(attend, (q,), (k,), v, start=0, window=None, scale=D**-0.5),
            )
            print(
                f"| {name}, {T} tokens | {theirs * 1e3:.1f} ms, {flops / theirs / 1e9:.0f} GF/s "
                f"| {ours * 1e3:.1f} ms, {flops / ours / 1e9:.0f} GF/s | {theirs / ours:.1f}× |"
            )


def latent() -> None:
    """Compare a decoding step of DeepSeek's attention with `ops.mla.absorbed`."""
    print("| absorbed attention | PyTorch | ours | |\n|---|---|---|---|")
    Dn, Dr, Dv, R = 128, 64, 128, 512
    for name, H in (("DeepSeek-V2-Lite", 16), ("DeepSeek-V3", 128)):
        w_kv = (torch.randn(H, Dn + Dv, R) / R**0.5).to(BF16)
        for S in (512, 4096, 16384):
            q_nope, q_pe = torch.randn(1, H, 1, Dn).to(BF16), torch.randn(1, H, 1, Dr).to(BF16)
            c_kv, k_pe = torch.randn(1, S, R).to(BF16), torch.randn(1, S, Dr).to(BF16)
            inputs = (q_nope, q_pe, c_kv, k_pe, w_kv)
            seen = AttentionMask(None, False, S - 1, None)
            theirs, ours = in_turn(
                partial(absorbed, *inputs, seen, scale=0.07, dropout=0.0),
                partial(attend_latents, *inputs, start=S - 1, scale=0.07),
            )
            print(
                f"| {name}, {S} tokens before | {theirs * 1e3:.2f} ms | {ours * 1e3:.2f} ms "
                f"| {theirs / ours:.1f}× |"
            )


def experts() -> None:
    """Compare the experts of DeepSeek-V2-Lite with the loop over them."""
    print("| 6 of 64 experts | PyTorch | ours | |\n|---|---|---|---|")
    C, width, E, A = 2048, 1408, 64, 6
    gate_up = (torch.randn(E, 2 * width, C) / C**0.5).to(BF16)
    down = (torch.randn(E, C, width) / width**0.5).to(BF16)
    for N in (16, 64, 512, 2048):
        inputs = (torch.randn(N, C).to(BF16), torch.rand(N, E).topk(A).indices, torch.rand(N, A))
        flops = 6 * N * A * C * width
        theirs, ours = in_turn(
            partial(looped_experts, *inputs, gate_up, down, F.silu),
            partial(grouped_silu_experts, *inputs, gate_up, down),
            repeats=7,
        )
        print(
            f"| {N} tokens | {theirs * 1e3:.1f} ms, {flops / theirs / 1e9:.0f} GF/s "
            f"| {ours * 1e3:.1f} ms, {flops / ours / 1e9:.0f} GF/s | {theirs / ours:.1f}× |"
        )


def mamba2() -> None:
    """Compare a mixer of Zamba2-1.2B with its steps in PyTorch."""
    H, P, N, W = 64, 64, 128, 4
    C = H * P + 2 * N
    weights = MixerWeights(
        taps=torch.randn(C, W).to(BF16),
        conv_bias=torch.randn(C).to(BF16),
        dt_bias=torch.randn(H),
        A_log=torch.rand(H),
        D=torch.randn(H),
        norm=torch.randn(H * P).to(BF16),
        num_groups=1,
        dt_limits=(0.001, 100.0),
        eps=1e-5,
    )
    window, state = torch.randn(1, W - 1, C).to(BF16), torch.randn(1, H, P, N)
    print("| mixer of Zamba2-1.2B | PyTorch | ours | |\n|---|---|---|---|")
    for T in (1, 512, 2048):
        projected = torch.randn(1, T, H * P + C + H).to(BF16)
        theirs, ours = in_turn(
            partial(mix_stepwise, projected, weights, window, state, None, chunk_size=256),
            partial(mix, projected, weights, window, state, None, chunk_size=256),
        )
        print(
            f"| {T} tokens | {theirs * 1e3:.2f} ms | {ours * 1e3:.2f} ms | {theirs / ours:.1f}× |"
        )


def main() -> None:
    """Run what the command line names."""
    parts = {"attention": attention, "latent": latent, "experts": experts, "mamba2": mamba2}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(parts))
    print(f"{report()}\nthreads: {torch.get_num_threads()}\n")
    with torch.inference_mode():
        for part in parser.parse_args().parts:
            parts[part]()
            print()


if __name__ == "__main__":
    main()
