"""The one place where a logit becomes a token."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.processors.base import (
    LogitsProcessor,
    LogitsProcessorList,
    LogitsWarper,
)
from quintet.generation.processors.warpers import TemperatureLogitsWarper, TopKLogitsWarper
from quintet.generation.text import Text
from quintet.ops import sampling

__all__ = ["Generators", "Sampler", "row_generators"]

Generators = torch.Generator | Sequence[torch.Generator]


class Sampler:
    """Reshapes the logits of a step and takes a token for each row.

    Args:
        processors: what reshapes them, in order; none for a plain choice.
        do_sample: draw from the distribution, rather than take the most likely token.
        generators: where the randomness of each row comes from; torch's own if not given.
    """

    def __init__(
        self,
        processors: LogitsProcessorList | None = None,
        *,
        do_sample: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        self.processors = LogitsProcessorList() if processors is None else processors
        self.do_sample = do_sample
        self.generators = generators
        first = len(self.processors)
        while first and _warps(self.processors[first - 1]):
            first -= 1
        self._readers = LogitsProcessorList(self.processors[:first])
        self._warpers: list[LogitsWarper] = self.processors[first:]
        bound = _bound(self._warpers)
        self._k = None if bound is None else bound.top_k
        # Of the few that top-k leaves, it leaves all.
        self._few = [warper for warper in self._warpers if warper is not bound]

    # -- one position ------------------------------------------------------------------------

    def scores(self, text: Text, logits: Tensor) -> Tensor:
        """Return the logits (B, V) of the token behind the text, reshaped, in float32."""
        return self._reshaped(self.processors, text, logits.to(torch.float32))

    def take(self, scores: Tensor) -> Tensor:
        """Take a token for each row, (B,), of scores (B, V).

        Raises:
            InputError: there is nothing to draw from.
        """
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return sampling.draw(scores.softmax(dim=-1), self.generators)

    def choose(self, text: Text, logits: Tensor) -> Tensor:
        """Take a token for each row, (B,), as `take(scores(…))` does, but by the shortest way.

        Where top-k bounds the distribution, all behind it happens to those few tokens alone.

        Raises:
            InputError: there is nothing to draw from.
        """
        logits = logits.to(torch.float32)
        if self._k is not None and self.do_sample:
            logits = self._reshaped(self._readers, text, logits)
            few = sampling.top_k_candidates(logits, self._k)
            if few is not None:
                values, ids = few
                for warper in self._few:
                    values = warper.warp(values)
                return ids.gather(1, self.take(values)[:, None])[:, 0]
            for warper in self._warpers:
                logits = warper.warp(logits)
            return self.take(logits)
        return self.take(self._reshaped(self.processors, text, logits))

    # -- several positions, for those who check what was drafted -------------------------------

    def scores_of_last(self, text: Text, logits: Tensor) -> Tensor:
        """Return the reshaped logits (B, P, V) of the tokens behind the last P prefixes of a text.

        `logits[:, -1]` are those of the token behind the whole text, `logits[:, -2]` of the one
        behind all but its last token, and so on: what one forward over the last P tokens of a
        text makes.
        """
        logits = logits.to(torch.float32)
        if not self.processors:
            return logits
        B, P, V = logits.shape
        if self._readers and P == 1:
            logits = self._reshaped(self._readers, text, logits[:, 0])[:, None]
        elif self._readers:
            ends = range(len(text) - P + 1, len(text) + 1)
            read = [
                self._reshaped(self._readers, text.cut(end), logits[:, place])
                for place, end in enumerate(ends)
            ]
            logits = torch.stack(read, dim=1)
        return self._warped(logits.reshape(B * P, V)).reshape(B, P, V)

    def log_probabilities(self, text: Text, logits: Tensor) -> Tensor:
        """Return what is drawn from behind the last P prefixes of a text, as logarithms (B, P, V).

        The arguments are those of `scores_of_last`.
        """
        return self.scores_of_last(text, logits).log_softmax(dim=-1)

    def draw(self, probabilities: Tensor, u: Tensor | None = None) -> Tensor:
        """Draw an index for each row, (B,), from probabilities (B, n) that need not sum to 1.

        With `u` (B, 1) of [0, 1), by those numbers.

        Raises:
            InputError: there is nothing to draw from.
        """
        return sampling.draw(probabilities, self.generators, u)

    def uniform(self, B: int, count: int, device: torch.device) -> Tensor:
        """Draw numbers (B, count) in [0, 1), those of each row from its own generator."""
        return sampling.uniform((B, count), device, self.generators)

    def reorder(self, rows: Tensor) -> None:
        """Go on with the rows (B,) of a beam search."""
        for processor in self.processors:
            if isinstance(processor, LogitsProcessor):
                processor.reorder(rows)

    def _warped(self, logits: Tensor) -> Tensor:
        """Return logits (N, V) after the warpers, which see no more than what top-k leaves."""
        few = None
        if self._k is not None and self.do_sample:
            few = sampling.top_k_candidates(logits, self._k)
        if few is None:
            for warper in self._warpers:
                logits = warper.warp(logits)
            return logits
        values, ids = few
        for warper in self._few:
            values = warper.warp(values)
        return torch.full_like(logits, -torch.inf).scatter_(1, ids, values)

    def _reshaped(self, processors: LogitsProcessorList, text: Text, logits: Tensor) -> Tensor:
        if not processors:
            return logits
        return processors(text.ids, logits, padding=text.padding)


def row_generators(
    generator: Generators | None, prompts: int, copies: int, device: torch.device
) -> list[torch.Generator] | None:
    """Return a generator for each of `prompts` · `copies` rows, None for torch's own.

    One generator gives each row a seed of its own, the same whatever the number of rows: what is
    drawn for a row does not depend on the others. With a list, each prompt has its own.

    Raises:
        InputError: a generator of another device, or another number of them than of prompts.
    """
    if generator is None:
        return None
    given = [generator] if isinstance(generator, torch.Generator) else list(generator)
    for one in given:
        if not isinstance(one, torch.Generator):
            raise InputError(
                f"generator holds a {type(one).__name__}; it has to be a torch.Generator, or one "
                "for each row"
            )
        if one.device.type != device.type:
            raise InputError(
                f"the generator is on {one.device} and the model on {device}; "
                f"make it with torch.Generator('{device}')"
            )
    if isinstance(generator, torch.Generator):
        return _seeded(generator, prompts * copies)
    if len(given) == prompts * copies:
        return given
    if len(given) == prompts:
        return [child for one in given for child in _seeded(one, copies)]
    raise InputError(
        f"generator holds {len(given)} generators for {prompts} prompts; give one, or one for "
        "each prompt"
    )


def _seeded(parent: torch.Generator, count: int) -> list[torch.Generator]:
    seed = torch.randint(2**63 - 1, (1,), device=parent.device, generator=parent)
    seeds = random.Random(int(seed))
    return [torch.Generator(parent.device).manual_seed(seeds.getrandbits(63)) for _ in range(count)]


def _warps(processor: object) -> bool:
    """Tell whether a processor is a warper that says itself how it is called."""
    return isinstance(processor, LogitsWarper) and (
        type(processor).__call__ is LogitsWarper.__call__
    )


def _bound(warpers: Sequence[LogitsWarper]) -> TopKLogitsWarper | None:
    """Return the top-k that nothing but a temperature, which keeps the order, precedes."""
    for warper in warpers:
        if type(warper) is TopKLogitsWarper and warper.filter_value == -torch.inf:
            return warper
        if type(warper) is not TemperatureLogitsWarper:
            return None
    return None
