"""Plain text to ids, in pieces where it is long: the ids of the whole, whatever the pieces."""

import re
from collections.abc import Iterator, Sequence

from quintet.errors import ConfigError, shown
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.data.records import PIECE

# A text is cut where a line begins, if not with space.
_LINE_END = re.compile(r"\n(?=\S)")
# What is looked at on both sides, to see whether a token ends there, and how often another place
# is tried. A text without lines is cut anywhere when it has become so long.
SIDE, TRIES, LONGEST = 64, 8, 32 * PIECE


class TextEncoder:
    """Encodes texts as a tokenizer does, and closes them.

    Args:
        tokenizer: whose ids.
        end: the token that closes a text, True for the tokenizer's end-of-text, False for none.
        control_tokens: whether control tokens that are written in a text are read as such.

    Attributes:
        begin: the ids that stand before each text.
        end: the ids that stand behind it.

    Raises:
        ConfigError: there is no such token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizer, end: bool | str, *, control_tokens: bool
    ) -> None:
        self._tokenizer, self._split = tokenizer, not control_tokens
        before, after = _surroundings(tokenizer)
        closing = _closing(tokenizer, end)
        self.begin: Sequence[int] = before
        self.end: Sequence[int] = after if closing in ([], after[-1:]) else [*after, *closing]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, and nothing around them."""
        ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=self._split,
            return_attention_mask=False,
            verbose=False,
        )[self._tokenizer.model_input_names[0]]
        return ids

    def stream(self, pieces: Iterator[str]) -> Iterator[list[int]]:
        """Yield the ids of a text that comes in pieces, some at a time."""
        context = buffer = ""
        for piece in pieces:
            buffer += piece
            while len(buffer) > 2 * PIECE and (cut := self._cut(buffer)):
                yield self._behind(context, buffer[:cut])
                context, buffer = buffer[max(0, cut - SIDE) : cut], buffer[cut:]
        if buffer:
            yield self._behind(context, buffer)

    def _cut(self, text: str) -> int:
        """Return the position at which a text can be cut; 0 if it has to grow first."""
        ends = [match.end() for match in _LINE_END.finditer(text, len(text) - PIECE)]
        for cut in ends[::-1][:TRIES]:
            alone, joined = self.encode([text[cut - SIDE : cut], text[cut - SIDE : cut + SIDE]])
            if joined[: len(alone)] == alone:
                return cut
        return len(text) - PIECE if len(text) > LONGEST else 0

    def _behind(self, context: str, text: str) -> list[int]:
        """Return the ids of a text as they are behind another."""
        if not context:
            return self.encode([text])[0]
        before, joined = self.encode([context, context + text])
        return joined[len(before) :]


def _surroundings(tokenizer: PreTrainedTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind a text."""
    options = {"return_attention_mask": False, "verbose": False}
    bare: list[int] = tokenizer("a", add_special_tokens=False, **options)["input_ids"]  # type: ignore[arg-type]
    whole: list[int] = tokenizer("a", add_special_tokens=True, **options)["input_ids"]  # type: ignore[arg-type]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _closing(tokenizer: PreTrainedTokenizer, end: bool | str) -> list[int]:
    if end is False:
        return []
    token = tokenizer.eos_token if end is True else end
    index = None if token is None else tokenizer.get_vocab().get(token)
    if index is None:
        named = "has no end-of-text token" if token is None else f"has no token {shown(token)}"
        raise ConfigError(
            f"data.end: the tokenizer {named} to close texts with; name one, as in "
            "end = '<|endoftext|>', or set end = false"
        )
    return [index]
