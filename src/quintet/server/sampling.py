"""How the tokens of an answer are to be chosen, as a request may say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request says of how tokens are chosen; None leaves it to the model's own config.

    Attributes:
        temperature: 0 takes the likeliest token always.
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
