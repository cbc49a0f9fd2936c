"""The sampler: processors, warpers, and the choice of a token per row."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.choice import Chosen, TokenChoice
from quintet.generation.processors.base import (
    ConstrainingProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    LogitsWarper,
)
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops import sampling
from quintet.parallel.agree import Agreement

Generators = torch.Generator | Sequence[torch.Generator]
# One for each row; None for torch's own.
RowGenerators = list[torch.Generator] | None


class Sampler:
    """Processes the logits of a step and chooses a token per row.

    Args:
        processors: what reshapes them, in order; none for a plain choice.
        do_sample: draw from the distribution, rather than take the most likely token.
        generators: where the randomness of each row comes from; torch's own if not given.
        agreement: of the processes that generate together, of which one chooses; None for one.
    """

    def __init__(
        self,
        processors: LogitsProcessorList | None = None,
        *,
        do_sample: bool = False,
        generators: Sequence[torch.Generator] | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self.processors = LogitsProcessorList() if processors is None else processors
        self.do_sample = do_sample
        self.generators = generators
        self.agreement = agreement
        first = len(self.processors)
        while first and _warps(self.processors[first - 1]):
            first -= 1
        self.readers = LogitsProcessorList(self.processors[:first])
        self.choice = TokenChoice(self.processors[first:], do_sample=do_sample)

    # -- one position ------------------------------------------------------------------------

    def scores(self, text: TokenBuffer, logits: Tensor, unfinished: Tensor | None = None) -> Tensor:
        """Return the processed logits (B, V) of the next token, in float32."""
        return self._reshaped(self.processors, text, logits.to(torch.float32), unfinished)

    def read(self, text: TokenBuffer, logits: Tensor, unfinished: Tensor | None = None) -> Tensor:
        """Apply the processors that read the text to logits (B, V); not the warpers."""
        return self._reshaped(self.readers, text, logits.to(torch.float32), unfinished)

    def take(
        self,
        scores: Tensor,
        unfinished: Tensor | None = None,
        *,
        step: int | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """Take a token per row, (B,), from scores (B, V).

        Args:
            scores: what is taken from.
            unfinished: (B,) True for rows that need a token, others get any; None for all.
            step: which new token it is, from 1, for the message of an error.
            u: (B, 1) numbers of [0, 1) to draw by.

        Raises:
            InputError: a row has no token left, or its scores hold NaN or infinity.
        """
        return self.choice.take(scores, self.generators, unfinished, step=step, u=u)

    def choose(
        self,
        text: TokenBuffer,
        logits: Tensor,
        unfinished: Tensor | None = None,
        *,
        step: int | None = None,
    ) -> Tensor:
        """Take a token per row, (B,), like `take(scores(…))` but faster.

        Raises:
            InputError: a row has no token left, or its scores hold NaN or infinity.
        """
        scores = self.read(text, logits, unfinished)
        return self.choice.choose(scores, self.generators, unfinished, step=step)

    def launch(self, text: TokenBuffer, logits: Tensor, unfinished: Tensor | None = None) -> Chosen:
        """Take a token per row like `choose`, without waiting for the device.

        Nobody waits for the device of the logits (B, V), but what reads the text may.
        """
        return self.choice.launch(self.read(text, logits, unfinished), self.generators)

    # -- several positions, for those who check what was drafted -------------------------------

    @property
    def constraints(self) -> list[ConstrainingProcessor]:
        """The processors that know allowed tokens before a forward."""
        return [one for one in self.readers if isinstance(one, ConstrainingProcessor)]

    @property
    def reads_unfinished(self) -> bool:
        """Whether a processor asks which rows are unfinished."""
        return self.readers.takes_argument("unfinished")

    def scores_of_last(
        self, text: TokenBuffer, logits: Tensor, unfinished: Tensor | None = None
    ) -> Tensor:
        """Return the processed logits (B, P, V) behind the last P prefixes of a text.

        `logits[:, -1]` are those of the token behind the whole text, `logits[:, -2]` of the one
        behind all but its last token, and so on: what one forward over the last P tokens of a
        text makes. `unfinished` (B, P) is False where they are not needed; behind a token that is
        forbidden, they never are.
        """
        logits = logits.to(torch.float32)
        if not self.processors:
            return logits
        P = logits.shape[1]
        if self.readers and P == 1:
            needed = None if unfinished is None else unfinished[:, 0]
            logits = self.read(text, logits[:, 0], needed)[:, None]
        elif self.readers:
            read: list[Tensor] = []
            needed = None
            for place, end in enumerate(range(len(text) - P + 1, len(text) + 1)):
                if unfinished is not None:
                    needed = (
                        unfinished[:, place] if needed is None else unfinished[:, place] & needed
                    )
                read.append(self.read(text.cut(end), logits[:, place], needed))
                if needed is not None and place + 1 < P:
                    follows = read[-1].gather(1, text.ids[:, end : end + 1])[:, 0]
                    needed = needed & ~follows.isneginf()
            logits = torch.stack(read, dim=1)
        return self.choice.warped_positions(logits)

    def log_probabilities(self, text: TokenBuffer, logits: Tensor) -> Tensor:
        """Return log-probabilities (B, P, V) behind the last P prefixes of a text.

        The arguments are those of `scores_of_last`.
        """
        return self.scores_of_last(text, logits).log_softmax(dim=-1)

    def draw(
        self, probabilities: Tensor, u: Tensor | None = None, unfinished: Tensor | None = None
    ) -> Tensor:
        """Draw an index per row, (B,), from unnormalised probabilities (B, n).

        With `u` (B, 1) of [0, 1), by those numbers; where `unfinished` (B,) is False, any.

        Raises:
            InputError: there is nothing to draw from.
        """
        return sampling.draw(probabilities, self.generators, u, unfinished)

    def uniform(self, B: int, count: int, device: torch.device) -> Tensor:
        """Draw uniform numbers (B, count), each row from its own generator."""
        return sampling.uniform((B, count), device, self.generators)

    def accompany(self, text: TokenBuffer, logits: Tensor) -> None:
        """Run the processors that call the model, while another process samples."""
        if self.processors:
            self.scores(text, logits)

    def reorder(self, rows: Tensor) -> None:
        """Reorder rows (B,) for beam search."""
        for processor in self.processors:
            if isinstance(processor, LogitsProcessor):
                processor.reorder(rows)

    def _reshaped(
        self,
        processors: LogitsProcessorList,
        text: TokenBuffer,
        logits: Tensor,
        unfinished: Tensor | None = None,
    ) -> Tensor:
        if not processors:
            return logits
        return processors(text.ids, logits, padding=text.padding, unfinished=unfinished)


def row_generators(
    generator: Generators | None, prompts: int, copies: int, device: torch.device
) -> RowGenerators:
    """Return a generator for each of `prompts` · `copies` rows, or None for torch's.

    One generator gives each row a seed of its own, the same whatever the number of rows: what is
    drawn for a row does not depend on the others. With a list, each prompt has its own.

    Raises:
        InputError: a generator of another device, or another number of them than of prompts.
    """
    if generator is None:
        return None
    given: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator]
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
    seed = torch.randint(2**63 - 1, (1,), device=parent.device, generator=parent, dtype=torch.long)
    seeds = random.Random(int(seed))
    return [torch.Generator(parent.device).manual_seed(seeds.getrandbits(63)) for _ in range(count)]


def _warps(processor: object) -> bool:
    """Return whether a processor is a warper without its own `__call__`."""
    return isinstance(processor, LogitsWarper) and (
        type(processor).__call__ is LogitsWarper.__call__
    )
