"""Log-probabilities of tokens with their text and bytes."""

from collections import deque
from collections.abc import Callable

from quintet.errors import TokenizerError
from quintet.server.questions import TokenScore
from quintet.serving import TokenLogprobs
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.bytelevel import token_bytes
from quintet.tokenization.decoding import decoder_steps


class Spelling:
    """Spells single tokens of a tokenizer.

    Args:
        tokenizer: whose tokens these are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        kinds = [step["type"] for step in decoder_steps(tokenizer)]
        self._bytes: Callable[[str], bytes] = token_bytes if kinds == ["ByteLevel"] else _written

    def raw(self, token: int) -> bytes:
        """Return a token's bytes; b"" if it has none."""
        if token in self._added:
            return self._added[token].content.encode("utf-8", "replace")
        try:
            spelt = self._tokenizer.convert_ids_to_tokens(token)
        except TokenizerError:
            return b""
        return b"" if spelt is None else self._bytes(spelt)

    def score(self, one: TokenLogprobs) -> TokenScore:
        """Return a token's score with alternatives, spelled."""
        top = tuple(self._one(token, logprob) for token, logprob in one.top)
        return self._one(one.id, one.logprob, top)

    def first(self, token: int) -> TokenScore:
        """Return the first prompt token, which has no score."""
        return self._one(token, None)

    def _one(
        self, token: int, logprob: float | None, top: tuple[TokenScore, ...] = ()
    ) -> TokenScore:
        raw = self.raw(token)
        return TokenScore(token, raw.decode("utf-8", "replace"), raw, logprob, top)


class Pending:
    """Scores of tokens whose text is not final yet."""

    def __init__(self) -> None:
        self._scores: deque[tuple[int, TokenScore]] = deque()

    def add(self, length: int, score: TokenScore) -> None:
        """Add the score of a token that finalised this many characters."""
        self._scores.append((length, score))

    def take(self, length: int) -> tuple[TokenScore, ...]:
        """Return the scores of the last `length` characters.

        What was before it was heard by nobody, as the marker between a thought and an answer.
        """
        taken: deque[TokenScore] = deque()
        while self._scores and (length > 0 or not self._scores[-1][0]):
            size, score = self._scores.pop()
            taken.appendleft(score)
            length -= size
        self._scores.clear()
        return tuple(taken)

    def rest(self) -> tuple[TokenScore, ...]:
        """Return all remaining scores."""
        taken = tuple(score for _, score in self._scores)
        self._scores.clear()
        return taken


def _written(spelt: str) -> bytes:
    """Return the bytes of a token."""
    if len(spelt) == 6 and spelt.startswith("<0x") and spelt.endswith(">"):
        return bytes([int(spelt[3:5], 16)])
    return spelt.replace("▁", " ").encode("utf-8", "replace")
