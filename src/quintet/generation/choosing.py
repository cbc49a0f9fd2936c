"""Chooses tokens for rows with different options."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.choice import Choice
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops import sampling
from quintet.ops.sending import brought


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
    choice: Choice


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
                Choice.beside([samplers[row].choice for row in rows]),
            )
            for rows in kinds.values()
        ]

    def choose(
        self, text_of: Callable[[int], TokenBuffer], logits: Tensor, steps: Sequence[int]
    ) -> list[int | Exception]:
        """Return each row's token, or the exception that prevented it.

        Args:
            text_of: returns a row's text, (1, T); asked where something reads it.
            logits: (B, V) of the tokens behind the texts.
            steps: which new token of its row it is, from 1, for the message of an error.
        """
        chosen: list[int | Exception] = [-1] * len(self.samplers)
        scores = logits.to(torch.float32)
        read = list(torch.split(scores, 1)) if self._reading else []
        for row in self._reading:
            try:
                read[row] = self._read(row, text_of(row), read[row])
            except Exception as error:
                chosen[row] = error
        if read:
            scores = read[0] if len(read) == 1 else torch.cat(read)
        for group in self._groups:
            self._take(group, scores, steps, chosen)
        return chosen

    def _read(self, row: int, text: TokenBuffer, scores: Tensor) -> Tensor:
        result = self.samplers[row].read(text, scores)
        if result.shape != scores.shape:
            raise InputError(
                f"a logits processor returned scores of shape {tuple(result.shape)} for one row of "
                f"{scores.shape[1]}; it has to return {tuple(scores.shape)}"
            )
        return result.to(scores)

    def _take(
        self, group: _Group, scores: Tensor, steps: Sequence[int], chosen: list[int | Exception]
    ) -> None:
        rows, choice = group.rows, group.choice
        if group.index is not None:
            scores = scores[brought(group.index, scores.device)]
        u = None
        if choice.do_sample:
            u = self._uniform(rows, scores.device)
        unfinished = None
        if any(isinstance(chosen[row], Exception) for row in rows):
            unfinished = torch.tensor(
                [not isinstance(chosen[row], Exception) for row in rows],
                dtype=torch.bool,
                device="cpu",
            )
        for _ in range(len(rows) + 1):
            try:
                tokens = choice.read(scores, unfinished, u=u)
                break
            except sampling.NothingLeftError as error:
                # The others take theirs, by the same numbers.
                row = rows[error.row]
                chosen[row] = sampling.NothingLeftError(0, error.best, steps[row])
                if unfinished is None:
                    unfinished = torch.ones(len(rows), dtype=torch.bool, device="cpu")
                unfinished[error.row] = False
        for row, token in zip(rows, tokens, strict=True):
            if not isinstance(chosen[row], Exception):
                chosen[row] = token

    def _uniform(self, rows: list[int], device: torch.device) -> Tensor:
        """Draw a uniform number per row, (n, 1), each from its own generator."""
        given = [self.samplers[row].generators for row in rows]
        own = [generators[0] for generators in given if generators is not None]
        if len(own) == len(rows):
            return sampling.uniform((len(rows), 1), device, own)
        return torch.cat([self.samplers[row].uniform(1, 1, device) for row in rows])
