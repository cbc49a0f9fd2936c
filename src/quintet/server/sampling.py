"""Sampling parameters of requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quintet.generation.requests import Served
from quintet.generation.speculative.prediction import MTPModel
from quintet.server.failures import invalid

# Divided by less than that, logits overflow; nothing but the likeliest token is drawn before.
COLDEST = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters; None leaves them to the model's config.

    Attributes:
        temperature: 0, or next to it, takes the likeliest token always.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among so many; 0 for all.
        min_p: draw among those at least this share as likely as the likeliest.
        repetition_penalty: logits of tokens that occurred are divided by it.
        presence_penalty: taken off the logit of each token that was generated.
        frequency_penalty: taken off as often as it was.
        logit_bias: what is added to the logits of ids.
        seed: the same one gives the same answer; answer i of several has seed + i.
        min_tokens: no end before so many.
        ignore_eos: go on behind what the model ends with.
        stop_token_ids: further ids that end the answer.
        speculate: "off", "lookup" or "mtp"; None for what the server does.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    speculate: str | None = None


def options_of(sampling: Sampling, model: Served, index: int) -> dict[str, Any]:
    """Return the engine options for one of several answers.

    Args:
        sampling: what the request says.
        model: what it leaves to the model's own config.
        index: which answer.

    Raises:
        ApiError: drafts of layers that the model has not.
    """
    config = model.generation_config
    options: dict[str, Any] = {}
    drawn = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    draws = bool(config.do_sample)
    if sampling.temperature is not None and sampling.temperature < COLDEST:
        draws = False
    elif any(value is not None for value in drawn.values()):
        draws = True
    options["do_sample"] = draws
    if draws:
        options |= {name: value for name, value in drawn.items() if value is not None}
        if sampling.top_k is None and config.top_k is None:
            # Where nobody says, all tokens are drawn from, as the protocol has it.
            options["top_k"] = 0
    for name, value in (
        ("repetition_penalty", sampling.repetition_penalty),
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        if value is not None:
            options[name] = float(value)
    if sampling.logit_bias:
        options["sequence_bias"] = {(k,): float(v) for k, v in sampling.logit_bias.items()}
    if sampling.min_tokens:
        options["min_new_tokens"] = sampling.min_tokens
    if sampling.ignore_eos or sampling.stop_token_ids:
        ends = [] if sampling.ignore_eos else config.eos_token_ids
        options["eos_token_id"] = [*ends, *sampling.stop_token_ids] or [-1]
    if sampling.seed is not None and draws:
        options["generator"] = torch.Generator(model.device).manual_seed(sampling.seed + index)
    if sampling.speculate is not None:
        if sampling.speculate == "mtp" and not (
            isinstance(model, MTPModel) and model.prediction_depth()
        ):
            raise invalid(
                "speculate='mtp' needs layers that predict further tokens, and this model has "
                "none; say lookup or off",
                "speculate",
            )
        options["speculate"] = sampling.speculate
    return options
