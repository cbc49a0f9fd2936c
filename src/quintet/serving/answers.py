"""Answers: pieces of text and usage that an engine returns."""

from dataclasses import dataclass

from quintet.generation.observing import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts of a request.

    Attributes:
        prompt: of the prompt.
        cached: of these, those that were read before, for another request.
        completion: that were generated.
        drafted: that were drafted on the way.
        accepted: of these, those that held.
    """

    prompt: int
    cached: int
    completion: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of an answer.

    Attributes:
        ids: the tokens.
        text: theirs, as far as later ones cannot change it; "" without a tokenizer.
        finish_reason: "stop" or "length" with the last of them; None while it goes on.
        usage: with the first of them, and with the last.
        texts: the text that became certain with each token; "" where that is yet to come.
        logprobs: how probable each was, where that was asked for.
        prompt_logprobs: with the first of them, how probable the tokens of the prompt were, where
            that was asked for; None for its first one, which nothing predicts.
        stop: the one of the `stop` strings that ended it, with the last of them.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    texts: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    stop: str | None = None
