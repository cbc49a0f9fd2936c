"""Common parts of OpenAI's chat and text completions."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from quintet.server.events import ServerEvent
from quintet.server.questions import Tokens, TokenScore

# What stands for the logarithm of zero, which JSON does not have.
LEAST = -9999.0
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Frame:
    """Fields that all chunks of a reply share.

    Args:
        prefix: of its id.
        model: as the request named it.
        fingerprint: of the model.
    """

    def __init__(self, prefix: str, model: str, fingerprint: str) -> None:
        self._id, self._created = f"{prefix}-{secrets.token_hex(16)}", int(time.time())
        self._model, self._fingerprint = model, fingerprint

    def __call__(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an object of this kind."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            **more,
        }


def event(data: dict[str, Any]) -> ServerEvent:
    """Return data as a server-sent event."""
    return ServerEvent(_JSON.encode(data))


def finite(logprob: float) -> float:
    """Clamp a log-probability for JSON."""
    return max(logprob, LEAST)


def scored(scores: Iterable[TokenScore]) -> list[dict[str, Any]]:
    """Return token scores in chat format."""
    return [{**_one(score), "top_logprobs": [_one(top) for top in score.top]} for score in scores]


def usage_of(usages_of_prompts: Iterable[Sequence[Tokens]]) -> dict[str, Any]:
    """Sum the usage of a reply; answers to one prompt share its tokens."""
    prompts = list(usages_of_prompts)
    prompt = sum(answers[0].prompt for answers in prompts)
    cached = sum(answers[0].cached for answers in prompts)
    usages = [one for answers in prompts for one in answers]
    completion = sum(one.completion for one in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": prompt - cached,
        },
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning for one in usages)},
    }


def _one(score: TokenScore) -> dict[str, Any]:
    logprob = LEAST if score.logprob is None else finite(score.logprob)
    return {"token": score.text, "logprob": logprob, "bytes": list(score.raw)}
