"""From logits to a token: which tokens stay in a distribution, and the draw from it.

What tells which tokens stay takes logits (B, V) in float32, where -inf is a token that is not
there, and returns (B, V), True for those that stay; `least` of the likeliest always do. Where a
row holds NaN, its NaN stays, so that the draw can tell. Each row is what it is alone. A `Value` is
one number for all rows, or a number for each, (B, 1), in float64 as Python has it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.errors import InputError

Value = float | Tensor

# Sorting a vocabulary larger than this costs more than looking among its likeliest few first.
_LARGE, _FEW = 8192, 1024
# How many tokens beyond the k-th are looked at for ties with it.
_TIES = 16
# Of many numbers, torch finds the largest in a tenth of the time in which it finds its place.
_MANY, _BLOCK = 16_384, 256


class NothingLeftError(InputError):
    """A row has no allowed token, or its scores are not numbers.

    Args:
        row: its index.
        best: the largest of its scores, which tells why, where it is known.
        step: which new token it would have been, from 1, where that is known.
    """

    def __init__(self, row: int, best: float | None = None, step: int | None = None) -> None:
        when = "" if step is None else f" for new token {step}"
        super().__init__(f"row {row} has no token to take{when}: {_why(best)}")
        self.row, self.best = row, best


def _why(best: float | None) -> str:
    forbidden = (
        "every one is forbidden; loosen what forbids tokens (such as bad_words_ids, "
        "suppress_tokens, min_new_tokens, prefix_allowed_tokens_fn or a logits_processor)"
    )
    broken = (
        "check the model's weights and dtype (float16 overflows where bfloat16 does not) and any "
        "logits_processor; remove_invalid_values=True goes on with numbers in their place"
    )
    if best is None:
        return f"its scores hold NaN or infinity, or {forbidden}"
    if best == -math.inf:
        return forbidden
    return f"its scores hold {'NaN' if math.isnan(best) else 'infinity'}; {broken}"


# -- what occurred ---------------------------------------------------------------------------


@operation("repetition penalty")
def penalise_repetition(logits: Tensor, ids: Tensor, kept: Tensor | None, penalty: float) -> Tensor:
    """Divide logits of tokens that occurred by `penalty`, multiply those below zero.

    (arXiv:1909.05858, §4.1)

    Shapes: ids (B, T); kept (B, T) True where an id counts, None for all.
    """
    places, wide = _occurred(logits, ids, kept)
    found = wide.gather(1, places)
    lower = torch.minimum if penalty >= 1 else torch.maximum
    wide.scatter_(1, places, lower(found * penalty, found / penalty))
    return wide[:, : logits.shape[1]]


def penalise_presence(logits: Tensor, ids: Tensor, kept: Tensor | None, penalty: float) -> Tensor:
    """Subtract `penalty` from the logits of tokens that occurred; shapes as above."""
    places, wide = _occurred(logits, ids, kept)
    wide.scatter_(1, places, wide.gather(1, places) - penalty)
    return wide[:, : logits.shape[1]]


def penalise_frequency(logits: Tensor, ids: Tensor, kept: Tensor | None, penalty: float) -> Tensor:
    """Subtract `penalty` from a token's logit for each time it occurred; shapes as above."""
    places, wide = _occurred(logits, ids, kept)
    taken = torch.full_like(places, -penalty, dtype=wide.dtype)
    return wide.scatter_add_(1, places, taken)[:, : logits.shape[1]]


def _occurred(logits: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each id's column, and the logits with a spare column for other ids."""
    V = logits.shape[1]
    # An id that there is no logit for, of a larger embedding, counts as little as padding.
    places = ids.clamp(max=V)
    return places if kept is None else torch.where(kept, places, V), F.pad(logits, (0, 1))


# -- which tokens stay -----------------------------------------------------------------------


def in_top_k(logits: Tensor, k: int | Tensor, most: int | None = None) -> Tensor:
    """Keep the k most likely tokens and ties with the last; k may be (B, 1).

    Args:
        most: the largest of several k; it is looked for if not given.
    """
    V = logits.shape[-1]
    if isinstance(k, Tensor):
        places = k.to(logits.device).clamp(max=V) - 1
        most = int(places.max()) + 1 if most is None else min(most, V)
        bar = logits.topk(most, dim=-1).values.gather(1, places)
    else:
        bar = logits.topk(min(k, V), dim=-1).values[:, -1:]
    return ~(logits < bar)


def in_top_p(logits: Tensor, p: Value, least: int = 1) -> Tensor:
    """Keep the fewest most likely tokens with total probability p (arXiv:1904.09751)."""
    # Whether few tokens suffice is asked of a CPU alone, as another device would have to be waited
    # for.
    if logits.shape[-1] <= _LARGE or logits.device.type != "cpu":
        return _sorted_nucleus(logits, p, least)
    stays, reached = _nucleus(logits, p, least)
    if not bool(reached.all()):
        # Row by row: which way is taken must not depend on the other rows.
        spread = ~reached
        rest = p[spread.to(p.device)] if isinstance(p, Tensor) else p
        stays[spread] = _sorted_nucleus(logits[spread], rest, least)
    return stays


def _sorted_nucleus(logits: Tensor, p: Value, least: int) -> Tensor:
    # Of tokens that tie, the last stay: on every device the same.
    values, order = logits.sort(dim=-1, stable=True)
    # Summed from the unlikely end, where the small ones do not drown.
    dropped = values.softmax(dim=-1).cumsum(dim=-1) <= alongside(1 - p, logits)
    dropped[:, -least:] = False
    return torch.ones_like(dropped).scatter(1, order, ~dropped)


def _nucleus(logits: Tensor, p: Value, least: int) -> tuple[Tensor, Tensor]:
    """Find the nucleus among the top tokens, and the rows (B,) for which they suffice."""
    values, ids = logits.topk(_FEW, dim=-1)
    probabilities = (values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    mass, p = probabilities.cumsum(dim=-1), alongside(p, logits)
    stays = mass - probabilities < p
    stays[:, :least] = True
    reached = (mass[:, -1:] >= p)[:, 0]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, stays), reached


def above_min_p(logits: Tensor, p: Value, least: int = 1) -> Tensor:
    """Keep tokens at least `p` times as likely as the top one (arXiv:2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    bar = alongside(p, logits) * probabilities.amax(dim=-1, keepdim=True)
    likely = ~(probabilities < bar)
    return likely if least == 1 else likely | _likeliest(probabilities, least)


def typical(logits: Tensor, mass: Value, least: int = 1) -> Tensor:
    """Keep tokens of that mass with information nearest to the entropy.

    (arXiv:2202.00666)
    """
    logs = logits.log_softmax(dim=-1)
    distance = (-logs - entropy(logs)[:, None]).abs()
    ranked, order = distance.sort(dim=-1)
    covered = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (covered < alongside(mass, logits)).sum(dim=-1, keepdim=True)
    last = last.clamp(max=logits.shape[-1] - 1)
    stays = ~(ranked > ranked.gather(1, last))
    stays[:, :least] = True
    return torch.zeros_like(stays).scatter(1, order, stays)


def above_epsilon(logits: Tensor, epsilon: Value, least: int = 1) -> Tensor:
    """Keep tokens of at least a probability (arXiv:2210.15191)."""
    return ~(logits.softmax(dim=-1) < alongside(epsilon, logits)) | in_top_k(logits, least)


def above_eta(logits: Tensor, epsilon: Value, least: int = 1) -> Tensor:
    """Keep tokens of at least min(ε, √ε·exp(-entropy)) (arXiv:2210.15191)."""
    likeliness = torch.exp(-entropy(logits.log_softmax(dim=-1)))[:, None]
    eta = alongside(epsilon**0.5, logits) * likeliness
    return above_epsilon(logits, torch.clamp(eta, max=alongside(epsilon, logits)), least)


def in_top_h(logits: Tensor, h: Value, n: int) -> Tensor:
    """Keep the most likely tokens that hold a share h of the entropy of the top n.

    (arXiv:2509.02510)
    """
    values, order = logits.topk(min(n, logits.shape[-1]), dim=-1)
    logs = values.log_softmax(dim=-1)
    terms = torch.nan_to_num(-logs.exp() * logs, nan=0.0)
    stays = terms.cumsum(dim=-1) <= alongside(h, logits) * terms.sum(dim=-1, keepdim=True)
    stays[:, 0] = True
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, stays)


def entropy(logs: Tensor) -> Tensor:
    """Return the entropy (B,) of log-probabilities (B, V); -inf adds nothing."""
    return -(logs.exp() * logs).nansum(dim=-1)


def alongside(value: Value, logits: Tensor) -> Value:
    """Return a value as a tensor beside logits; numbers stay numbers."""
    return value.to(logits) if isinstance(value, Tensor) else value


def _likeliest(scores: Tensor, count: int) -> Tensor:
    first = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, first, True)


def top_k_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the logits (B, n) that `in_top_k` keeps, sorted, and their ids (B, n).

    What is in excess has -inf. The third tells for which rows (B,) more tokens tie with the k-th
    than there is room for, so that some are missing; None for no row. None at all where there are
    hardly more tokens than candidates.
    """
    V = logits.shape[-1]
    if k + _TIES >= V:
        return None
    values, ids = logits.topk(k + _TIES, dim=-1)
    bar = values[:, k - 1 : k]
    # Where fewer than k tokens are there at all, the k-th is -inf, and none is missing.
    tied = ((values[:, -1:] == bar) & (bar > -torch.inf))[:, 0]
    candidates = values.masked_fill(values < bar, -torch.inf)
    return candidates, ids, tied if bool(tied.any()) else None


# -- the draw --------------------------------------------------------------------------------


def uniform(
    shape: tuple[int, ...],
    device: torch.device,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw uniform numbers (B, ...), each row from its own generator."""
    if generators is None:
        return torch.rand(shape, dtype=torch.float32, device=device)
    rows = [
        torch.rand(shape[1:], dtype=torch.float32, device=g.device, generator=g) for g in generators
    ]
    return torch.stack(rows).to(device)


def draw(
    probabilities: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    u: Tensor | None = None,
    unfinished: Tensor | None = None,
) -> Tensor:
    """Draw an index per row, (B,), from unnormalised probabilities (B, n).

    With `u` (B, 1) of [0, 1), by those numbers.

    Raises:
        NothingLeftError: a row has nothing to draw, or something that is not a number, and is not
            one of those that `unfinished` (B,) excepts.
    """
    mass = probabilities.cumsum(dim=-1)
    total = mass[:, -1:]
    stuck = [row for row, (whole,) in enumerate(total.tolist()) if not 0 < whole < math.inf]
    for row in stuck:
        if unfinished is None or bool(unfinished[row]):
            raise NothingLeftError(row)
        # Of a row at its end, any index will do.
        mass[row] = 1.0
    if u is None:
        u = uniform((len(mass), 1), mass.device, generators)
    return _found(mass, u)


def drawn(probabilities: Tensor, u: Tensor) -> Tensor:
    """Draw as `draw` with given numbers (B, 1), without waiting for the device.

    Of a row that has nothing to draw, any index.
    """
    return _found(probabilities.cumsum(dim=-1), u).clamp(max=probabilities.shape[-1] - 1)


def _found(mass: Tensor, u: Tensor) -> Tensor:
    total = mass[:, -1:]
    # Strictly below the total, so that what is found has a probability above zero.
    point = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, point, right=True)[:, 0]


@operation("draw")
def draw_in_one_pass(
    scores: Tensor,
    u: Tensor,
    *,
    temperature: Value | None,
    top_k: int | Tensor | None,
    top_p: Value | None,
    min_p: Value | None,
) -> tuple[Tensor, Tensor] | None:
    """Draw a token per row (B,) with given numbers u (B, 1); also return the largest score.

    Scores (B, V) are divided by the temperature, then what is not `in_top_k`, `in_top_p` and
    `above_min_p` is left out, one after the other. None if no backend does that in one pass.
    """
    return None


def likeliest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest score of each (..., V) and its index, (...) each.

    NaN is larger than any number.
    """
    V = scores.shape[-1]
    if V < _MANY or scores.device.type != "cpu":
        best, tokens = scores.max(dim=-1)
        return best, tokens
    blocks = V // _BLOCK
    rows = scores.reshape(-1, V)
    whole = torch.unflatten(rows[:, : blocks * _BLOCK], 1, (blocks, _BLOCK))
    block = whole.amax(dim=-1).argmax(dim=1)
    index = torch.arange(len(rows), dtype=torch.long, device=scores.device)
    best, place = whole[index, block].max(dim=1)
    tokens = block * _BLOCK + place
    if blocks * _BLOCK < V:
        last, place = rows[:, blocks * _BLOCK :].max(dim=1)
        later = (last > best) | (last.isnan() & ~best.isnan())
        best = torch.where(later, last, best)
        tokens = torch.where(later, blocks * _BLOCK + place, tokens)
    return best.view(scores.shape[:-1]), tokens.view(scores.shape[:-1])


def check_left(best: Sequence[float], unfinished: Tensor | None, step: int | None = None) -> None:
    """Check that each row's largest score allows a token.

    Raises:
        NothingLeftError: a row has none, and is not one that `unfinished` (B,) excepts.
    """
    for row, score in enumerate(best):
        if not -math.inf < score < math.inf and (unfinished is None or bool(unfinished[row])):
            raise NothingLeftError(row, score, step)


def draw_several(
    logits: Tensor, count: int, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Draw `count` different indices per row, without replacement, (B, count).

    They come in the order in which they are drawn (Gumbel-top-k, arXiv:1903.06059).
    """
    u = uniform(tuple(logits.shape), logits.device, generators)
    tiny = torch.finfo(u.dtype).tiny
    gumbel = -torch.log((-torch.log(u.clamp(min=tiny))).clamp(min=tiny))
    return (logits + gumbel).topk(count, dim=-1).indices
