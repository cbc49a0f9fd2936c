"""The contenders, each behind the same four calls. A worker process holds one of them."""

import time
from typing import Any, Protocol

__all__ = ["Peer", "make"]


class Peer(Protocol):
    """Something that runs a language model."""

    def load(self, path: str) -> None:
        """Read the weights."""
        ...

    def first_token(self) -> None:
        """Answer a short prompt."""
        ...

    def prefill(self, batch: int, tokens: int, seed: int) -> float:
        """Return the seconds from a prompt to its next token."""
        ...

    def decode(self, batch: int, depth: int, steps: int, seed: int, limit: float) -> float:
        """Return the mean seconds of a step at a depth."""
        ...

    def facts(self, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        """Return what a measurement needs at the least, and how it is run, where that is known."""
        ...


class Quintet:
    """Ours."""

    def __init__(self, weights: str, threads: int) -> None:
        import torch

        from quintet.auto import AutoModelForCausalLM
        from quintet.measurement import floors, synthetic, timing

        torch.set_num_threads(threads)
        self.torch, self.auto = torch, AutoModelForCausalLM
        self.floors, self.timing, self.synthetic = floors, timing, synthetic
        self.weights = weights

    def load(self, path: str) -> None:
        options = {} if self.weights == "bf16" else {"quantize": self.weights}
        self.model = self.auto.from_pretrained(path, dtype="bfloat16", **options)

    def first_token(self) -> None:
        self.timing.time_prompt(self.model, 1, 8)

    def prefill(self, batch: int, tokens: int, seed: int) -> float:
        return self.timing.time_prompt(self.model, batch, tokens, seed)

    def decode(self, batch: int, depth: int, steps: int, seed: int, limit: float) -> float:
        return self.timing.time_steps(self.model, batch, depth, steps, seed, limit)

    def facts(self, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"attention": self.model.config.attn_implementation}
        if kind == "prefill":
            facts["flops"] = self.floors.prompt_flops(self.model.config, batch, tokens)
        if kind == "decode":
            cache = self.synthetic.filled_cache(self.model, batch, 1)
            counted = self.floors.step_bytes(self.model, cache, batch, tokens)
            facts |= {
                "bytes": counted.total,
                "weight_bytes": counted.weights,
                "cache_bytes": counted.cache,
                "state_bytes": counted.states,
                "flops": self.floors.prompt_flops(self.model.config, batch, 1),
            }
        return facts


class Transformers:
    """Transformers as it comes: eager forwards, the attention it chooses, a growing cache."""

    def __init__(self, weights: str, threads: int) -> None:
        if weights != "bf16":
            raise ValueError(f"Transformers is measured in bf16, not in {weights}")
        import torch
        import transformers

        from quintet.measurement.synthetic import random_ids

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.transformers, self.random_ids = torch, transformers, random_ids

    def load(self, path: str) -> None:
        auto = self.transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(path, dtype=self.torch.bfloat16)

    def first_token(self) -> None:
        self.prefill(1, 8, 0)

    def prefill(self, batch: int, tokens: int, seed: int) -> float:
        ids = self.random_ids(self.model.config.vocab_size, batch, tokens, seed)
        with self.torch.no_grad():
            started = time.perf_counter()
            self._next(self.model(ids, use_cache=True, logits_to_keep=1))
            return time.perf_counter() - started

    def decode(self, batch: int, depth: int, steps: int, seed: int, limit: float) -> float:
        with self.torch.no_grad():
            cache = self._filled(batch, depth)
            ids = self.random_ids(self.model.config.vocab_size, batch, steps + 1, seed)
            started, made = 0.0, 0
            for column in ids.split(1, dim=1):
                self._next(
                    self.model(column, past_key_values=cache, use_cache=True, logits_to_keep=1)
                )
                if not started:
                    started = time.perf_counter()
                    continue
                made += 1
                if time.perf_counter() - started > limit:
                    break
            return (time.perf_counter() - started) / made

    def facts(self, kind: str, batch: int, tokens: int) -> dict[str, Any]:
        return {
            "attention": self.model.config._attn_implementation,
            "version": self.transformers.__version__,
        }

    def _next(self, output: Any) -> list[int]:
        return output.logits[:, -1].argmax(dim=-1).tolist()

    def _filled(self, batch: int, depth: int) -> Any:
        """Return a cache of `depth` tokens, all but the first of them random."""
        ids = self.random_ids(self.model.config.vocab_size, batch, 1)
        cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for index, layer in enumerate(cache.layers):
            held = vars(layer).get("keys")
            if depth > 1 and held is not None and held.numel():
                longer = (
                    self.torch.randn(*x.shape[:2], depth - 1, x.shape[3], dtype=x.dtype)
                    for x in (layer.keys, layer.values)
                )
                cache.update(*longer, index)
        if cache.get_seq_length() != depth:
            raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens, not {depth}")
        return cache


class Machine:
    """What this machine could do, measured between the others' turns."""

    def __init__(self, threads: int) -> None:
        import torch

        from quintet.measurement import machine

        torch.set_num_threads(threads)
        self.torch, self.machine = torch, machine

    def bandwidth(self) -> dict[str, Any]:
        """Return the bytes a second that are read, and by what."""
        found = self.machine.read_bandwidth(0.15)
        return {"bytes_per_second": found.bytes_per_second, "how": found.how}

    def gemm(self) -> dict[str, Any]:
        """Return the floating-point operations a second of a bfloat16 product."""
        return {"flops_per_second": self.machine.gemm_peak(self.torch.bfloat16, 0.3)}


def make(peer: str, weights: str, threads: int) -> Any:
    """Return a contender, its libraries imported and its threads set."""
    if peer == "llama.cpp":
        from benchmarks.llama import LlamaCpp

        return LlamaCpp(weights, threads)
    if peer.startswith("training "):
        from benchmarks.training_peers import Trainer

        return Trainer(peer.removeprefix("training "), threads)
    if peer == "machine":
        return Machine(threads)
    return {"quintet": Quintet, "transformers": Transformers}[peer](weights, threads)
