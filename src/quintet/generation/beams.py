"""Beam search and beam sampling: several continuations of each prompt, followed at once.

The rules are those of Transformers. Of each prompt, N beams run on and N ends are held. A step
takes the best candidates (or draws them); those that end here, and are among the N best, contend
for a place among the ends, by log-probability over length to the power of the length penalty;
the N best of the others run on.

Axes: B prompts, N beams of each, K candidates of each, M tokens at the most, V the vocabulary.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quintet.generation.decode import Generation
from quintet.generation.outputs import Record
from quintet.generation.sampler import Sampler
from quintet.generation.stopping import Stopping
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import check_left, draw_several

__all__ = ["BeamOptions", "Found", "beam_search"]

# What is added to the score of what must not be taken, far below any log-probability.
_NEVER = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """How a beam search goes, by the names of `GenerationConfig`."""

    num_beams: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_count: int = 0

    @property
    def candidates(self) -> int:
        """How many to take, so that enough are left to run on if those of each end token end."""
        return max(2, 1 + self.eos_count) * self.num_beams


@dataclass(frozen=True, slots=True)
class Found:
    """The best continuations of each prompt, the best first.

    Shapes: tokens and rows (B·returned, new), scores (B·returned,); a row is that of B·N to which
    the token was added, -1 behind an end.
    """

    tokens: Tensor
    rows: Tensor
    scores: Tensor


@dataclass(slots=True)
class _Beams:
    """Continuations: tokens and rows (B, n, M), scores (B, n)."""

    tokens: Tensor
    rows: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, B: int, N: int, room: int, pad: int, device: torch.device) -> Self:
        return cls(
            torch.full((B, N, room), pad, device=device),
            torch.full((B, N, room), -1, dtype=torch.int32, device=device),
            torch.full((B, N), _NEVER, device=device),
        )

    def best(self, scores: Tensor, count: int) -> tuple["_Beams", Tensor]:
        """Return the best by other scores, with these, and their places (B, count)."""
        values, places = scores.topk(count, dim=1)
        wide = places[..., None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(self.tokens.gather(1, wide), self.rows.gather(1, wide), values), places


def beam_search(run: Generation, options: BeamOptions) -> Found:
    """Return the best continuations of each prompt.

    Args:
        run: the prompts, the N rows of each side by side; what it holds is changed. If it
            samples, candidates are drawn, and there is a generator for each prompt.
        options: how the search goes.
    """
    forward, text, sampler, record = run.forward, run.text, run.sampler, run.record
    output, room, pad = run.output, run.rooms.most, run.pad
    N, device = options.num_beams, text.ids.device
    B = len(text.ids) // N
    running = _Beams.empty(B, N, room, pad, device)
    # The beams of a prompt begin alike: only the first may be gone on with.
    running.scores[:, 0] = 0.0
    ends = _Beams.empty(B, N, room, pad, device)
    ended = torch.zeros(B, N, dtype=torch.bool, device=device)
    improves = torch.ones(B, 1, dtype=torch.bool, device=device)

    for step in range(room):
        record.forward(output)
        scores = sampler.scores(text, output.logits[:, -1].to(torch.float32).log_softmax(dim=-1))
        if record.scores is not None:
            record.scores.append(scores.clone())
        taken = _candidates(running, scores, step, sampler, options)
        # A prompt that has ended, in whatever way, needs no further token.
        needs = improves[:, 0] & ~(ended.any(dim=1) & taken.scores[:, 0].isneginf())
        if options.early_stopping is True:
            needs &= ~ended.all(dim=1)
        check_left(taken.scores[:, 0].tolist(), needs, step + 1)
        stops = _stops(taken, text, run.stopping, step, record)
        full = run.rooms.last(step + 1)
        stops = stops | (full if isinstance(full, bool) else full.reshape(B, N)[:, :1])

        running, _ = taken.best(taken.scores + stops * _NEVER, N)
        ends, ended = _hold(ends, ended, taken, stops, improves, step + 1, options)

        length = step + 1
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = room
        improves = improves & _may_improve(running, ends, ended, length, options.length_penalty)
        enough = options.early_stopping is True and bool(ended.all())
        if enough or bool(stops.all()) or not bool(improves.any()):
            break
        rows = running.rows[:, :, step].flatten().long()
        if not torch.equal(rows, torch.arange(B * N, device=device)):
            forward.reorder(rows)
            sampler.reorder(rows)
            text.select(rows)
        text.append(running.tokens[:, :, step].flatten())
        output = forward.step(text)
    return _found(ends, options.num_return_sequences)


def _candidates(
    running: _Beams, scores: Tensor, step: int, sampler: Sampler, options: BeamOptions
) -> _Beams:
    """Return the K candidates of each prompt for the next token, by scores (B·N, V)."""
    B, N = running.scores.shape
    V = scores.shape[1]
    total = (scores.reshape(B, N, V) + running.scores[..., None]).reshape(B, N * V)
    K = min(options.candidates, N * V)
    if sampler.do_sample:
        places = draw_several(total, K, sampler.generators)
        values = total.gather(1, places)
    else:
        values, places = total.topk(K, dim=1)
    beams = places // V
    wide = beams[..., None].expand(-1, -1, running.tokens.shape[2])
    tokens, rows = running.tokens.gather(1, wide), running.rows.gather(1, wide)
    tokens[:, :, step] = places % V
    first = torch.arange(B, device=beams.device)[:, None] * N
    rows[:, :, step] = (beams + first).to(rows.dtype)
    return _Beams(tokens, rows, values)


def _stops(
    taken: _Beams, text: TokenBuffer, stopping: Stopping, step: int, record: Record
) -> Tensor:
    """Mark the candidates that end, (B, K)."""
    tokens = taken.tokens[:, :, step]
    if not stopping.criteria:
        return stopping.ends(tokens)
    before = text.ids[taken.rows[:, :, step].flatten().long()]
    ids = torch.cat((before, tokens.reshape(-1, 1)), dim=1)
    padding = text.padding
    if padding is not None:
        padding = padding[taken.rows[:, :, step].flatten().long()]
    return stopping(ids, record.seen_scores(), padding).reshape(tokens.shape)


def _hold(
    ends: _Beams,
    ended: Tensor,
    taken: _Beams,
    stops: Tensor,
    improves: Tensor,
    length: int,
    options: BeamOptions,
) -> tuple[_Beams, Tensor]:
    """Return the N best of the ends there were and the candidates that end, and which are ends."""
    N = options.num_beams
    new = stops.clone()
    # The candidates behind the first N are there to run on.
    new[:, N:] = False
    full = ended.all(dim=1, keepdim=True) & (options.early_stopping is True)
    scores = taken.scores / length**options.length_penalty
    for barred in (full, ~improves, ~new):
        scores = scores + barred * _NEVER
    both = _Beams(
        torch.cat((ends.tokens, taken.tokens), dim=1),
        torch.cat((ends.rows, taken.rows), dim=1),
        torch.cat((ends.scores, scores), dim=1),
    )
    held, places = both.best(both.scores, N)
    return held, torch.cat((ended, new), dim=1).gather(1, places)


def _may_improve(
    running: _Beams, ends: _Beams, ended: Tensor, length: int, length_penalty: float
) -> Tensor:
    """Tell for which prompts the best that runs on may end better than the worst end, (B, 1)."""
    best = running.scores[:, :1] / length**length_penalty
    worst = torch.where(ended, ends.scores.amin(dim=1, keepdim=True), _NEVER)
    better: Tensor = best > worst
    return better.any(dim=1, keepdim=True)


def _found(ends: _Beams, count: int) -> Found:
    rows = ends.rows[:, :count].flatten(0, 1)
    new = int((rows >= 0).sum(dim=1).max())
    return Found(
        tokens=ends.tokens[:, :count].flatten(0, 1)[:, :new],
        rows=rows[:, :new],
        scores=ends.scores[:, :count].flatten(),
    )
