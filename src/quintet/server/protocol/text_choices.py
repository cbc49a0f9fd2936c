"""Continuations of prompts, as OpenAI's completions write them."""

from collections.abc import Iterator, Sequence
from typing import Any

from quintet.parsing.events import Content
from quintet.server.protocol.answers import finite
from quintet.server.protocol.completions import Piece
from quintet.server.questions import AnswerEvent, Finish, Prompted, Tokens, TokenScore
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.stream import IncrementalDecoder


class TextPrompt:
    """A prompt with the scores of its tokens, which its texts may begin with.

    Args:
        piece: the prompt.
        echo: texts begin with it.
        scored: scores of tokens were asked for.
    """

    def __init__(self, piece: Piece, *, echo: bool, scored: bool) -> None:
        self.piece, self.echo, self.scored = piece, echo, scored
        self.scores: tuple[TokenScore, ...] = ()


class TextChoice:
    """One continuation of a prompt, while it is written.

    Args:
        index: among the choices.
        prompt: what it goes on from.
        tokenizer: tells where tokens begin in the text.

    Attributes:
        usage: how many tokens it took, once that is known.
    """

    def __init__(self, index: int, prompt: TextPrompt, tokenizer: PreTrainedTokenizer) -> None:
        self.usage: Tokens | None = None
        self._index, self._prompt = index, prompt
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        self._sent = self._decoded = 0
        self._echoed = not prompt.echo

    def feed(self, answer_event: AnswerEvent) -> Iterator[dict[str, Any]]:
        """Yield the parts that an event adds to the text."""
        match answer_event.event:
            case Prompted():
                self._prompt.scores = answer_event.scores
                return
            case Content(text):
                yield from self._echo()
                yield self._part(text, self._scores(text, answer_event.scores))
            case Finish(reason, usage):
                self.usage = usage
                yield from self._echo()
                yield self._part("", self._scores("", answer_event.scores), reason)

    def _echo(self) -> Iterator[dict[str, Any]]:
        if self._echoed:
            return
        self._echoed = True
        piece = self._prompt.piece
        logprobs = None
        if self._prompt.scored:
            logprobs = _written(self._prompt.scores, piece.offsets)
        self._sent = self._decoded = len(piece.text)
        yield self._part(piece.text, logprobs)

    def _scores(self, text: str, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        self._sent += len(text)
        if not self._prompt.scored or not scores:
            return None
        offsets = []
        for score in scores:
            # Of what a stop string took away nothing was sent.
            offsets.append(min(self._decoded, self._sent))
            self._decoded += len(self._decoder.push(score.id))
        return _written(scores, offsets)

    def _part(
        self, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "text": text,
            "index": self._index,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole of a text that came in parts."""
    scored = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    logprobs = None
    if scored:
        logprobs = {name: [one for part in scored for one in part[name]] for name in scored[0]}
    return {
        **parts[-1],
        "text": "".join(part["text"] for part in parts),
        "logprobs": logprobs,
    }


def _written(scores: Sequence[TokenScore], offsets: Sequence[int]) -> dict[str, Any]:
    """Return the probabilities of tokens in lists; the first token of a prompt has none."""
    return {
        "tokens": [_spelled(score) for score in scores],
        "token_logprobs": [
            None if score.logprob is None else finite(score.logprob) for score in scores
        ],
        "top_logprobs": [_likeliest(score) for score in scores],
        "text_offset": list(offsets),
    }


def _likeliest(score: TokenScore) -> dict[str, float] | None:
    """Return the likeliest tokens and the one that was taken."""
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in (*score.top, score):
        # Of two that are spelt alike the likelier counts.
        found.setdefault(_spelled(one), finite(one.logprob or 0.0))
    return found


def _spelled(score: TokenScore) -> str:
    """Return a token as text; half of a character by its bytes, so that no two look alike."""
    try:
        return score.raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.raw)
