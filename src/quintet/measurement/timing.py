"""One measurement at a time: a prompt, or some steps at a depth."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.measurement.synthetic import filled_cache, random_ids
from quintet.modeling.heads import CausalLMHead
from quintet.ops.sampling import likeliest


@dataclass(frozen=True, slots=True)
class Spread:
    """The seconds that one thing took, several times."""

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Keep them in the order they were measured."""
        return cls(tuple(seconds))

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def most(self) -> float:
        """The longest."""
        return max(self.seconds)


@torch.no_grad()
def time_prompt(
    model: CausalLMHead, batch: int, tokens: int, seed: int = 0, cache: Cache | None = None
) -> float:
    """Time a prompt of random ids (batch, tokens), up to the next token of each row, in seconds.

    Args:
        cache: an empty one, which the prompt fills; by default of the kind that the model grows.
    """
    ids = random_ids(model.config.vocab_size, batch, tokens, seed).to(model.device)
    _wait(model)
    started = time.perf_counter()
    _next(model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
    return time.perf_counter() - started


@torch.no_grad()
def time_steps(
    model: CausalLMHead,
    batch: int,
    depth: int,
    steps: int,
    seed: int = 0,
    limit: float = 60.0,
    cache: Cache | None = None,
) -> float:
    """Time `steps` behind a context of `depth` tokens: the mean seconds of one.

    Steps as `generate()` takes them: the weights do not change in between. Begins with a step that
    does not count; ends early after `limit` seconds.

    Args:
        cache: an empty one for the context; by default of the kind that the model grows.
    """
    cache = filled_cache(model, batch, depth, cache)
    ids = random_ids(model.config.vocab_size, batch, steps + 1, seed).to(model.device)
    started, steps_taken = 0.0, 0
    with model.fused_session(cache):
        for column in torch.split(ids, 1, dim=1):
            output = model(column, past_key_values=cache, use_cache=True, logits_to_keep=1)
            _next(output.logits)
            if not started:
                started = time.perf_counter()
                continue
            steps_taken += 1
            if time.perf_counter() - started > limit:
                break
    return (time.perf_counter() - started) / steps_taken


def _next(logits: Tensor) -> list[int]:
    """Take the most likely tokens, waiting for the device."""
    return likeliest(logits[:, -1])[1].tolist()


def _wait(model: CausalLMHead) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
