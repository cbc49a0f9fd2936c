"""Records log-probabilities and embeddings of a text during its forwards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quintet.errors import InputError, NonFiniteError, shown

# So many logits a row are turned into probabilities at once, and twice as many are made.
ROWS = 64

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token under the model, before any processor.

    Attributes:
        id: the token.
        logprob: the logarithm of its probability.
        top: the likeliest tokens in its place and theirs, from the likeliest on.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of n tokens, and the `top` likeliest at each place.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    result: list[TokenLogprobs] = []
    for start in range(0, len(tokens), ROWS):
        own = tokens[start : start + ROWS]
        scores = logits[start : start + len(own)].to(torch.float32)
        total = scores.logsumexp(dim=-1, keepdim=True)
        taken = scores.gather(1, torch.tensor(own, device=scores.device, dtype=torch.long)[:, None])
        logprobs = (taken - total)[:, 0].tolist()
        if not all(map(math.isfinite, logprobs)):
            raise NonFiniteError(
                "what the model made of the text holds NaN or infinity; check its weights and dtype"
            )
        best: list[tuple[tuple[int, float], ...]] = [()] * len(own)
        if top:
            values, ids = scores.topk(min(top, scores.shape[1]), dim=-1)
            pairs = zip(ids.tolist(), (values - total).tolist(), strict=True)
            best = [tuple(zip(*row, strict=True)) for row in pairs]
        result += map(TokenLogprobs, own, logprobs, best)
    return result


class Observed:
    """The recordings of a text besides its tokens.

    Args:
        logprobs: how many likely tokens to name in the place of each new one; None to say nothing.
        prompt_logprobs: the same of the tokens of the prompt.
        pooling: how to make one vector of the prompt: the state of its "last" token, or their
            "mean"; None for no vector.

    Attributes:
        new: what is known of the new tokens.
        prompt: what is known of those of the prompt, the first of which nothing predicts.
        reads: whether all of the prompt is still to be run over with this looking on.

    Raises:
        InputError: a number below 0, or another way of pooling.
    """

    def __init__(
        self,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if count is not None and (type(count) is not int or count < 0):
                raise InputError(
                    f"{name}={shown(count)} has to be how many likely tokens to name, 0 for none "
                    "beside the token itself, or None"
                )
        if pooling not in (None, "last", "mean"):
            raise InputError(f"pooling={shown(pooling)} has to be 'last' or 'mean'")
        self.logprobs, self.prompt_logprobs, self.pooling = logprobs, prompt_logprobs, pooling
        self.new: list[TokenLogprobs] = []
        self.prompt: list[TokenLogprobs | None] = []
        self.reads = prompt_logprobs is not None or pooling is not None
        self._read = 0
        self._sum: Tensor | None = None

    def restart(self) -> None:
        """Discard the record of a prompt that is read again."""
        self.prompt, self._read, self._sum = [], 0, None

    def saw_logits(self, logits: Tensor, following: Sequence[int]) -> None:
        """Record logits (n, V) of prompt tokens, and the tokens that follow.

        Nothing follows the last one yet.
        """
        if self.prompt_logprobs is None:
            return
        if not self.prompt:
            self.prompt.append(None)
        self.prompt += token_logprobs(logits, following, self.prompt_logprobs)

    def saw_states(self, states: Tensor) -> None:
        """Record the states (n, C) of prompt tokens."""
        states = states.to(torch.float32)
        self._read += len(states)
        if self.pooling == "last":
            self._sum = states[-1].clone()
        else:
            total = states.sum(dim=0)
            self._sum = total if self._sum is None else self._sum + total

    def took(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Record the logits (n, V) from which new tokens were chosen."""
        if self.logprobs is not None and tokens:
            self.new += token_logprobs(logits, tokens, self.logprobs)

    def vector(self, *, normalize: bool) -> Tensor:
        """Return the prompt's pooled vector (C,) in float32, optionally normalised.

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        assert self._sum is not None
        vector = self._sum if self.pooling == "last" else self._sum / self._read
        if not vector.isfinite().all():
            raise NonFiniteError(
                "what the model made of the text holds NaN or infinity; check its weights and dtype"
            )
        if normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        return vector
