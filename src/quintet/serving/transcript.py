"""Incremental detokenisation with stop strings."""

from collections.abc import Sequence

from quintet.errors import InputError, shown
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.stream import IncrementalDecoder

# Bounds of what is looked for in every token's text.
MOST, LONGEST = 64, 1024


class StopStrings:
    """Finds the first of several strings in streamed text.

    Args:
        strings: what is looked for.

    Attributes:
        found: the one that was there; None as long as none was.

    Raises:
        InputError: an empty string, one that is too long, or too many.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        listed = isinstance(strings, tuple | list)
        if not listed or not all(isinstance(one, str) for one in strings):
            raise InputError(f"stop={shown(strings)} has to be a list of strings")
        if len(strings) > MOST or not all(0 < len(one) <= LONGEST for one in strings):
            raise InputError(
                f"stop={shown(strings)} has to be at most {MOST} strings of 1 to {LONGEST} "
                "characters"
            )
        self.found: str | None = None
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._pending = ""

    def feed(self, text: str) -> str:
        """Add text; return the part that certainly precedes any of the strings."""
        if self.found is not None:
            return ""
        text = self._pending + text
        places = [
            (position, -len(one)) for one in self._strings if (position := text.find(one)) >= 0
        ]
        if places:
            position, length = min(places)
            self.found = text[position : position - length]
            self._pending = ""
            return text[:position]
        keep = min(self._longest - 1, len(text))
        while keep > 0 and not any(one.startswith(text[-keep:]) for one in self._strings):
            keep -= 1
        certain = len(text) - max(keep, 0)
        self._pending = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return the text held back as a possible beginning of a string."""
        rest, self._pending = self._pending, ""
        return rest


class Transcript:
    """Detokenises token by token, up to a stop string.

    Args:
        tokenizer: decodes; None for no text.
        stop: strings that end the text before them.
        keep_special: whether special tokens are part of the text; one that ends it never is.
        least: how many tokens the text has before it may end: what is said in those before is no
            stop string.

    Raises:
        InputError: strings that cannot be looked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer | None,
        stop: Sequence[str] = (),
        *,
        keep_special: bool = False,
        least: int = 0,
    ) -> None:
        self._stop = StopStrings(stop)
        self._unsearched = max(least - 1, 0)
        if tokenizer is None and stop:
            raise InputError("stop strings are looked for in text, and the engine has no tokenizer")
        self._decoder = None
        if tokenizer is not None:
            self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=not keep_special)
        self._texts: list[str] = []

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stop.found

    def take(self, token: int, ends: bool) -> bool:
        """Add a token; return whether a stop string ends the text."""
        if self._decoder is None:
            self._texts.append("")
            return False
        text = "" if ends else self._decoder.push(token)
        if self._unsearched:
            self._unsearched -= 1
            self._texts.append(text)
        else:
            self._texts.append("" if ends else self._stop.feed(text))
        return self.stop is not None

    def finish(self) -> None:
        """Release the text held back."""
        if self._decoder is not None and self.stop is None and self._texts:
            rest = self._stop.feed(self._decoder.flush())
            self._texts[-1] += rest + self._stop.flush()

    def take_texts(self) -> tuple[str, ...]:
        """Return the text of each token since the last call."""
        texts, self._texts = tuple(self._texts), []
        return texts
