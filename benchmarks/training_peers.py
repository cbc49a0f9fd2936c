"""Who takes a training step: ours and Transformers' models, the same weights and optimiser."""

import re
import time
from pathlib import Path
from typing import Any

__all__ = ["Trainer"]

STATUS = Path("/proc/self/status")


class Trainer:
    """A model and its optimiser, behind the calls of `benchmarks.worker`."""

    def __init__(self, library: str, threads: int) -> None:
        import torch

        if library == "quintet":
            from quintet import AutoModelForCausalLM
        else:
            import transformers
            from transformers import AutoModelForCausalLM

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.auto = torch, AutoModelForCausalLM

    def load(self, path: str) -> None:
        """Read the weights in float32, and make an optimiser for them."""
        self.model = self.auto.from_pretrained(path, dtype=self.torch.float32).train()
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def first_token(self) -> None:
        """Do nothing: a step warms up by itself."""

    def step(
        self, context: int, tokens: int, amp: bool, recompute: bool, texts: int, seed: int
    ) -> dict[str, Any]:
        """Take a step, and return what it took of the clock, the processor and memory.

        Args:
            context: the length of a row.
            tokens: of all rows.
            texts: into how many a row is divided, which positions tell.
            seed: of the ids.
        """
        torch = self.torch
        if recompute:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()
        made = torch.Generator().manual_seed(seed)
        rows = tokens // context
        size = (rows, context)
        ids = torch.randint(0, self.model.config.vocab_size, size, generator=made)
        given = {"input_ids": ids, "labels": ids, "use_cache": False}
        if texts > 1:
            given["position_ids"] = torch.arange(context // texts).repeat(rows, texts)
        before = _start_high_water()
        clock, processor = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = self.model(**given).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "seconds": time.perf_counter() - clock,
            "processor_seconds": time.process_time() - processor,
            "above": _bytes("VmHWM") - before,
            "loss": loss.item(),
        }


def _start_high_water() -> int:
    """Forget the most memory held so far, and return what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes("VmRSS")


def _bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])
