"""Beam search and beam sampling.

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

from quintet.generation.decode import Generation, note
from quintet.generation.outputs import ForwardOutput, GenerationRecord
from quintet.generation.sampler import Sampler
from quintet.generation.stopping import Stopping
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import check_left, draw_several
from quintet.parallel.agree import Agreement

# What is added to the score of what must not be taken, far below any log-probability.
_NEVER = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """The options of a beam search, under the names of `GenerationConfig`."""

    num_beams: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_count: int = 0

    @property
    def candidates(self) -> int:
        """The number of candidates per step: enough if all beams end with an end token."""
        return max(2, 1 + self.eos_count) * self.num_beams


@dataclass(frozen=True, slots=True)
class BeamSearchResult:
    """The best continuations of each prompt, best first.

    Shapes: tokens and rows (B·returned, new), scores (B·returned,); a row is that of B·N to which
    the token was added, -1 behind an end.
    """

    tokens: Tensor
    rows: Tensor
    scores: Tensor

    def numbers(self) -> Tensor:
        """Pack into one integer tensor, (B·returned, 2·new + 1)."""
        scores = self.scores.view(torch.int32)[:, None]
        return torch.cat((self.tokens, self.rows.long(), scores.long()), dim=1)

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> "BeamSearchResult":
        """Unpack such a tensor."""
        new = numbers.shape[1] // 2
        scores = numbers[:, -1].to(torch.int32).view(torch.float32)
        return cls(numbers[:, :new], numbers[:, new : 2 * new].to(torch.int32), scores)


@dataclass(slots=True)
class _Beams:
    """Tokens and source rows (B, n, M), scores (B, n)."""

    tokens: Tensor
    rows: Tensor
    scores: Tensor

    @classmethod
    def empty(cls, B: int, N: int, steps: int, pad: int, device: torch.device) -> Self:
        return cls(
            torch.full((B, N, steps), pad, device=device, dtype=torch.long),
            torch.full((B, N, steps), -1, dtype=torch.int32, device=device),
            torch.full((B, N), _NEVER, device=device, dtype=torch.float32),
        )

    def best(self, scores: Tensor, count: int) -> tuple["_Beams", Tensor]:
        """Return the `count` best by given scores, and their indices (B, count)."""
        values, places = scores.topk(count, dim=1)
        wide = places[..., None].expand(-1, -1, self.tokens.shape[2])
        return _Beams(self.tokens.gather(1, wide), self.rows.gather(1, wide), values), places


def beam_search(run: Generation, options: BeamOptions) -> BeamSearchResult:
    """Return the best continuations of each prompt.

    Args:
        run: the prompts, the N rows of each side by side; what it holds is changed. If it
            samples, candidates are drawn, and there is a generator for each prompt.
        options: how the search goes.
    """
    agreement = run.sampler.agreement
    search, output = _Search(run, options), run.output
    for step in range(run.limits.most):
        note(run, output)
        if agreement is None:
            follows = search.advance(output, step)
        else:
            follows = _advance_agreed(agreement, search, output, step)
        if not follows.numel():
            break
        rows, tokens = follows
        if not torch.equal(rows, torch.arange(len(rows), device=rows.device, dtype=torch.long)):
            run.forward.reorder(rows)
            run.sampler.reorder(rows)
            run.text.select(rows)
        run.text.append(tokens)
        output = run.forward.step(run.text)
    if agreement is None:
        return search.found()
    return BeamSearchResult.of_numbers(
        agreement.decided(lambda: search.found().numbers(), run.text.ids.device)
    )


class _Search:
    """The running and finished beams of each prompt."""

    def __init__(self, run: Generation, options: BeamOptions) -> None:
        N, device = options.num_beams, run.text.ids.device
        B, max_new_tokens = len(run.text.ids) // N, run.limits.most
        self.run, self.options = run, options
        self.running = _Beams.empty(B, N, max_new_tokens, run.pad, device)
        # The beams of a prompt begin alike: only the first may be gone on with.
        self.running.scores[:, 0] = 0.0
        self.ends = _Beams.empty(B, N, max_new_tokens, run.pad, device)
        self.ended = torch.zeros(B, N, dtype=torch.bool, device=device)
        self.improves = torch.ones(B, 1, dtype=torch.bool, device=device)

    def advance(self, output: ForwardOutput, step: int) -> Tensor:
        """Return the source rows and tokens of the running beams, (2, B·N), or None at the end."""
        run, options, record = self.run, self.options, self.run.record
        B, N = self.ended.shape
        logits = output.logits[:, -1].to(torch.float32)
        scores = run.sampler.scores(run.text, logits.log_softmax(dim=-1))
        if record.scores is not None:
            record.scores.append(scores.clone())
        taken = _candidates(self.running, scores, step, run.sampler, options)
        # A prompt that has ended, in whatever way, needs no further token.
        needs = self.improves[:, 0] & ~(self.ended.any(dim=1) & taken.scores[:, 0].isneginf())
        if options.early_stopping is True:
            needs &= ~self.ended.all(dim=1)
        check_left(taken.scores[:, 0].tolist(), needs, step + 1)
        stops = _stops(taken, run.text, run.stopping, step, record)
        full = run.limits.last(step + 1)
        stops = stops | (full if isinstance(full, bool) else full.reshape(B, N)[:, :1])

        self.running, _ = taken.best(taken.scores + stops * _NEVER, N)
        self.ends, self.ended = _hold(
            self.ends, self.ended, taken, stops, self.improves, step + 1, options
        )
        length = step + 1
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = run.limits.most
        self.improves = self.improves & _may_improve(
            self.running, self.ends, self.ended, length, options.length_penalty
        )
        enough = options.early_stopping is True and bool(self.ended.all())
        if enough or bool(stops.all()) or not bool(self.improves.any()):
            return run.text.ids.new_empty(0)
        running = self.running
        return torch.stack(
            (running.rows[:, :, step].flatten().long(), running.tokens[:, :, step].flatten())
        )

    def found(self) -> BeamSearchResult:
        """Return the best finished beams."""
        ends, count = self.ends, self.options.num_return_sequences
        rows = ends.rows[:, :count].flatten(0, 1)
        new = int((rows >= 0).sum(dim=1).max())
        return BeamSearchResult(
            tokens=ends.tokens[:, :count].flatten(0, 1)[:, :new],
            rows=rows[:, :new],
            scores=ends.scores[:, :count].flatten(),
        )


def _advance_agreed(
    agreement: Agreement, search: _Search, output: ForwardOutput, step: int
) -> Tensor:
    """Search in one process, and broadcast which rows run on."""
    run, logits = search.run, output.logits[:, -1]
    if not agreement.decides:
        run.sampler.accompany(run.text, logits)
    device = run.text.ids.device
    follows = agreement.decided(lambda: search.advance(output, step), device)
    if run.record.scores is not None:
        if not agreement.decides:
            # Where the head is elsewhere, logits have no data.
            scores = torch.empty(logits.shape, dtype=torch.float32, device=device)
            run.record.scores.append(scores)
        run.record.scores[-1] = agreement.broadcast(run.record.scores[-1])
    return follows


def _candidates(
    running: _Beams, scores: Tensor, step: int, sampler: Sampler, options: BeamOptions
) -> _Beams:
    """Return each prompt's K candidates for the next token, from scores (B·N, V)."""
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
    first = torch.arange(B, device=beams.device, dtype=torch.long)[:, None] * N
    rows[:, :, step] = (beams + first).to(rows.dtype)
    return _Beams(tokens, rows, values)


def _stops(
    taken: _Beams, text: TokenBuffer, stopping: Stopping, step: int, record: GenerationRecord
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
    """Return the N best of finished beams and ending candidates, and which are finished."""
    N = options.num_beams
    new = stops.clone()
    # The candidates behind the first N are there to run on.
    new[:, N:] = False
    full = ended.all(dim=1, keepdim=True) & (options.early_stopping is True)
    scores = taken.scores / float(length) ** options.length_penalty
    for barred in (full, ~improves, ~new):
        scores = scores + barred * _NEVER
    candidates = _Beams(
        torch.cat((ends.tokens, taken.tokens), dim=1),
        torch.cat((ends.rows, taken.rows), dim=1),
        torch.cat((ends.scores, scores), dim=1),
    )
    best, places = candidates.best(candidates.scores, N)
    return best, torch.cat((ended, new), dim=1).gather(1, places)


def _may_improve(
    running: _Beams, ends: _Beams, ended: Tensor, length: int, length_penalty: float
) -> Tensor:
    """Return for which prompts a running beam may still beat the worst finished one, (B, 1)."""
    best = running.scores[:, :1] / float(length) ** length_penalty
    worst = torch.where(ended, ends.scores.amin(dim=1, keepdim=True), _NEVER)
    better: Tensor = best > worst
    return better.any(dim=1, keepdim=True)
