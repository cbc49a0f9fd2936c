"""One answer of a model: shown while it is made, its reasoning folded, and kept."""

import sys
import time
from typing import Literal

from torch import Tensor

from quintet.cli.terminal import CLEAR, Waiting, can_dim, can_move, dimmed, width
from quintet.cli.wrapping import Wrapped
from quintet.generation.streamers import TextStreamer
from quintet.parsing import Content, Reasoning, parser_for
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["Answer", "Continuation", "Shown"]

# What is shown of a thought: how long it took, all of it, or nothing.
Shown = Literal["fold", "show", "hide"]


class Continuation(TextStreamer):
    """Writes a text and what follows to standard output.

    Args:
        tokenizer: turns ids into text.
        echo: write the text, too.
        waiting: is over once something is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, echo: bool, waiting: Waiting) -> None:
        super().__init__(tokenizer, skip_prompt=not echo, skip_special_tokens=True)
        self._waiting = waiting

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of it."""
        if text or stream_end:
            self._waiting.stop()
        super().on_finalized_text(text, stream_end)


class Answer(TextStreamer):
    """Writes an answer to standard output, and keeps it, also where it is interrupted.

    `reading` are the seconds to the first token, `seconds` those to the last; `text` is the answer
    and `thought` what the model thought before it.

    Args:
        tokenizer: turns ids into text.
        prompt: what the model continues.
        reasoning: "fold" says that it thinks and then for how long, "show" writes it, dimmed
            at a terminal, and "hide" leaves it out.
        waiting: is over with the first token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        prompt: str,
        reasoning: Shown,
        waiting: Waiting,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.seconds = 0.0
        self.reading = 0.0
        self.thought = ""
        self.text = ""
        self._parser = parser_for(tokenizer, prompt, tools=False)
        self._reasoning = reasoning
        self._prompt_seen = False
        # No id: the text that is left at the end comes with none.
        self._token = -1
        self._started = time.perf_counter()
        self._waiting = waiting
        at_terminal = sys.stdout.isatty()
        self._dims = at_terminal and can_dim()
        self._folds = at_terminal and can_move()
        self._page = Wrapped(sys.stdout, lambda: width(sys.stdout) if self._folds else None)
        self._status = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if not self._prompt_seen:
            # From here on it is the model that takes its time.
            self._started = time.perf_counter()
            self._prompt_seen = True
            super().put(value)
            return
        if not self.tokens:
            self._waiting.stop()
            self.reading = time.perf_counter() - self._started
        for token in value.reshape(-1):
            self.tokens += 1
            self._token = int(token)
            super().put(token)

    def end(self) -> None:
        """Write the rest and a line end."""
        self._waiting.stop()
        self._token = -1
        super().end()
        self.seconds = time.perf_counter() - self._started

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer, or say that the model thinks."""
        events = self._parser.feed(text, self._token)
        if stream_end:
            events += self._parser.flush()
        for event in events:
            match event:
                case Reasoning():
                    self.thought += event.text
                    self._think(event.text)
                case Content():
                    if self.thought and not self.text:
                        self._thought()
                    self.text += event.text
                    self._page.write(event.text)
        if stream_end:
            if self.thought and not self.text:
                self._thought()
            sys.stdout.write("\n")
        sys.stdout.flush()

    def _think(self, piece: str) -> None:
        if self._reasoning == "show":
            self._page.write(piece, self._dimmed)
        elif self._reasoning == "fold" and self._folds:
            self._status = f"{CLEAR}{self._dimmed(f'thinking, {self.tokens} tokens')}"
            sys.stdout.write(self._status)

    def _thought(self) -> None:
        """End the reasoning: the answer begins on a line of its own."""
        if self._reasoning == "show":
            self._page.write("\n\n")
        elif self._reasoning == "fold" and sys.stdout.isatty():
            seconds = time.perf_counter() - self._started
            line = self._dimmed(f"thought for {seconds:.1f} s, {self.tokens} tokens")
            sys.stdout.write(f"{CLEAR if self._status else ''}{line}\n")

    def _dimmed(self, text: str) -> str:
        return dimmed(text) if self._dims else text
