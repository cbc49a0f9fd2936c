"""Chooses tokens for rows with different options."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.choice import Chosen, TokenChoice
from quintet.generation.fetching import Fetched
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops import sampling
from quintet.ops.sending import brought, sent


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows whose tokens are chosen together.

    Attributes:
        rows: which they are.
        index: the same as a tensor; None for all rows there are.
        choice: how tokens are taken.
    """

    rows: list[int]
    index: Tensor | None
    choice: TokenChoice


class Taken:
    """A token for each row, on its way to the host.

    Args:
        chosen: the tokens (B,), and the best scores, on the device of the scores.
        failed: rows that have none, and why.
        steps: which new token of its row each is, from 1.
    """

    def __init__(self, chosen: Chosen, failed: dict[int, Exception], steps: Sequence[int]) -> None:
        self.tokens = chosen.tokens
        self._fetched, self._failed, self._steps = Fetched(*chosen), failed, steps

    def read(self) -> list[int | Exception]:
        """Return each row's token, or the exception that prevented it; waits for these alone."""
        tokens, best = self._fetched.read()
        results: list[int | Exception] = tokens.tolist()
        for row, score in enumerate(best.tolist()):
            if not -math.inf < score < math.inf:
                results[row] = sampling.NothingLeftError(0, score, self._steps[row])
        for row, error in self._failed.items():
            results[row] = error
        return results


class Choosing:
    """Chooses a token for each row, as its sampler would alone.

    Rows whose options are of the same kind are taken at once, with a value a row where values
    differ; what reads a text gets the text and the scores of its row, nothing else.

    Args:
        samplers: those of the rows, each of a single row.

    Raises:
        InputError: a sampler has generators for several rows.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        kinds: dict[Hashable, list[int]] = {}
        for row, sampler in enumerate(samplers):
            if sampler.generators is not None and len(sampler.generators) != 1:
                raise InputError(
                    f"the sampler of row {row} has {len(sampler.generators)} generators; one for "
                    "a single row has one, or none"
                )
            kinds.setdefault(sampler.choice.kind, []).append(row)
        self.samplers = tuple(samplers)
        self._reading = [row for row, sampler in enumerate(samplers) if sampler.readers]
        self._groups = [
            _Group(
                rows,
                None if len(kinds) == 1 else torch.tensor(rows, dtype=torch.long, device="cpu"),
                TokenChoice.stack([samplers[row].choice for row in rows]),
            )
            for rows in kinds.values()
        ]

    def choose(
        self, text_of: Callable[[int], TokenBuffer], logits: Tensor, steps: Sequence[int]
    ) -> Taken:
        """Take a token for each row, without waiting for the device.

        Args:
            text_of: returns a row's text, (1, T); asked where something reads it.
            logits: (B, V) of the tokens behind the texts.
            steps: which new token of its row it is, from 1, for the message of an error.
        """
        failed: dict[int, Exception] = {}
        scores = logits.to(torch.float32)
        read = list(torch.split(scores, 1)) if self._reading else []
        for row in self._reading:
            try:
                read[row] = self._read(row, text_of(row), read[row])
            except Exception as error:
                failed[row] = error
        if read:
            scores = read[0] if len(read) == 1 else torch.cat(read)
        taken = [self._take(group, scores) for group in self._groups]
        if len(taken) == 1:
            return Taken(taken[0], failed, steps)
        places = [row for group in self._groups for row in group.rows]
        back = sent(sorted(range(len(places)), key=places.__getitem__), torch.long, scores.device)
        joined = (torch.cat(part)[back] for part in zip(*taken, strict=True))
        return Taken(Chosen(*joined), failed, steps)

    def _read(self, row: int, text: TokenBuffer, scores: Tensor) -> Tensor:
        result = self.samplers[row].read(text, scores)
        if result.shape != scores.shape:
            raise InputError(
                f"a logits processor returned scores of shape {tuple(result.shape)} for one row of "
                f"{scores.shape[1]}; it has to return {tuple(scores.shape)}"
            )
        return result.to(scores)

    def _take(self, group: _Group, scores: Tensor) -> Chosen:
        if group.index is not None:
            scores = scores[brought(group.index, scores.device)]
        u = self._uniform(group.rows, scores.device) if group.choice.do_sample else None
        return group.choice.launch(scores, u=u)

    def _uniform(self, rows: list[int], device: torch.device) -> Tensor:
        """Draw a uniform number per row, (n, 1), each from its own generator."""
        given = [self.samplers[row].generators for row in rows]
        own = [generators[0] for generators in given if generators is not None]
        if len(own) == len(rows):
            return sampling.uniform((len(rows), 1), device, own)
        return torch.cat([self.samplers[row].uniform(1, 1, device) for row in rows])
