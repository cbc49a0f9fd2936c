"""Summaries of many requests: percentiles, rates, goodput."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from quintet.errors import InputError, shown
from quintet.measurement.serving.asking import RequestRecord

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Goals:
    """Latency goals in milliseconds; None for no goal.

    Attributes:
        ttft: to its first token.
        tpot: a token after that, in the mean of the answer.
        e2e: to its end.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def of(cls, given: Sequence[str]) -> "Goals":
        """Read `ttft:500`; InputError where one is none of the three."""
        found: dict[str, float] = {}
        for one in given:
            name, _, number = one.partition(":")
            try:
                value = float(number)
            except ValueError:
                value = 0.0
            if name not in ("ttft", "tpot", "e2e") or not 0 < value < float("inf"):
                raise InputError(
                    f"{shown(one)} is no goal; they are milliseconds, ttft:500, tpot:50 or e2e:9000"
                )
            found[name] = value
        return cls(**found)

    def met(self, one: Mapping[str, float]) -> bool:
        """Return whether an answer met them; one of a single token has no time a token."""
        wanted = (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
        return all(most is None or one.get(name, 0.0) <= most / 1e3 for name, most in wanted)


def summary(requests: Sequence[RequestRecord], goals: Goals | None = None) -> dict[str, Any]:
    """Summarise requests, in seconds and tokens, as JSON values."""
    whole = [one for one in requests if one.error is None and not one.dropped]
    failed = [one for one in requests if one.error is not None]
    began = min((one.due for one in requests), default=0.0)
    seconds = max((one.ended for one in requests), default=0.0) - began
    times = [_times(one) for one in whole]
    # What came before a client went came as soon as it came.
    answered = [one for one in requests if one.error is None and one.came]
    gaps = [after - before for one in answered for before, after in pairwise(one.came)]
    tokens = {
        "prompt": sum(one.prompt for one in whole),
        "cached": sum(one.cached for one in whole),
        "completion": sum(one.completion for one in requests),
    }
    found: dict[str, Any] = {
        "seconds": seconds,
        "requests": {
            "all": len(requests),
            "answered": len(whole),
            "dropped": sum(one.dropped for one in requests),
            "failed": len(failed),
        },
        "statuses": {str(k): v for k, v in Counter(one.status for one in requests).items()},
        "errors": dict(Counter(one.error for one in failed).most_common(10)),
        "tokens": tokens,
        "tokens_counted_by": "server" if all(one.counted for one in whole) else "pieces",
        "per_second": {
            "requests": _rate(len(whole), seconds),
            "prompt_tokens": _rate(tokens["prompt"], seconds),
            "completion_tokens": _rate(tokens["completion"], seconds),
        },
    }
    found["ttft"] = _spread([one.came[0] - one.due for one in answered])
    for name in ("tpot", "e2e"):
        found[name] = _spread([one[name] for one in times if name in one])
    found["itl"] = _spread(gaps)
    if goals is not None and goals != Goals():
        good = sum(map(goals.met, times))
        found["good"] = {
            "requests": good,
            "share": good / len(requests) if requests else 0.0,
            "per_second": _rate(good, seconds),
        }
    return found


def _times(one: RequestRecord) -> dict[str, float]:
    found = {"e2e": one.ended - one.due}
    if one.came:
        found["ttft"] = one.came[0] - one.due
        if one.completion > 1:
            found["tpot"] = (one.came[-1] - one.came[0]) / (one.completion - 1)
    return found


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    at = np.percentile(values, PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, at, strict=True)},
        "most": float(max(values)),
    }


TITLES = {
    "ttft": "to the first token",
    "itl": "between two pieces",
    "tpot": "a token, by answer",
    "e2e": "to the end",
}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a summary as a table for people."""
    columns = ("mean", *(f"p{p}" for p in PERCENTILES), "most")
    rows = [("ms", *columns)]
    for name, title in TITLES.items():
        spread = result[name]
        if spread is not None:
            rows.append((title, *(f"{spread[column] * 1e3:,.1f}" for column in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield f"| {' | '.join(cells)} |"
    yield ""
    requests, tokens, rates = result["requests"], result["tokens"], result["per_second"]
    ends = ", ".join(f"{requests[name]} {name}" for name in ("dropped", "failed") if requests[name])
    yield (
        f"{requests['answered']} of {requests['all']} requests answered in "
        f"{result['seconds']:.1f} s{f' ({ends})' if ends else ''}"
    )
    counted_by = "" if result["tokens_counted_by"] == "server" else " (counted in pieces)"
    yield (
        f"{rates['completion_tokens']:,.1f} tok/s out{counted_by}, {rates['prompt_tokens']:,.1f} "
        f"tok/s in, {rates['requests']:.2f} requests/s"
    )
    if tokens["prompt"]:
        yield (
            f"prompts of {tokens['prompt'] / max(1, requests['answered']):,.0f} tokens, "
            f"{tokens['cached'] / tokens['prompt']:.0%} of them read before"
        )
    if (good := result.get("good")) is not None:
        yield f"{good['per_second']:.2f} requests/s in good time, {good['share']:.0%} of all"
    for error, count in result["errors"].items():
        yield f"failed {count} times: {error}"
