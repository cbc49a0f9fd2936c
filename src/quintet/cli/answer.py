"""One answer of a model: shown while it is made, its reasoning folded, and kept."""

import os
import sys
import time
from typing import Literal

from torch import Tensor

from quintet.cli.options import can_dim, dimmed
from quintet.cli.reasoning import Kind, ReasoningSplitter
from quintet.generation.streamers import TextStreamer
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["Answer", "Reasoning"]

Reasoning = Literal["fold", "show", "hide"]
BACK = "\r\x1b[K"


class Answer(TextStreamer):
    """Writes an answer to standard output, and keeps it, also where it is interrupted.

    Args:
        tokenizer: turns ids into text.
        prompt: what the model continues.
        reasoning: "fold" says that it thinks and then for how long, "show" writes it, dimmed
            at a terminal, and "hide" leaves it out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, prompt: str, reasoning: Reasoning) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self.seconds = 0.0
        self.texts: dict[Kind, str] = {"reasoning": "", "answer": ""}
        self._splitter = ReasoningSplitter(prompt)
        self._reasoning = reasoning
        self._prompt_seen = False
        self._started = time.perf_counter()
        at_terminal = sys.stdout.isatty()
        self._dims = at_terminal and can_dim()
        self._folds = at_terminal and os.environ.get("TERM") != "dumb"
        self._status = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if self._prompt_seen:
            self.tokens += value.numel()
        else:
            # From here on it is the model that takes its time.
            self._started = time.perf_counter()
        self._prompt_seen = True
        super().put(value)

    def end(self) -> None:
        """Write the rest and a line end."""
        super().end()
        self.seconds = time.perf_counter() - self._started

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer, or say that the model thinks."""
        pieces = self._splitter.push(text)
        if stream_end:
            pieces += self._splitter.flush()
        for kind, piece in pieces:
            begins = not self.texts[kind]
            self.texts[kind] += piece
            if kind == "reasoning":
                self._think(piece)
            else:
                if begins and self.texts["reasoning"]:
                    self._thought()
                sys.stdout.write(piece)
        if stream_end:
            if self.texts["reasoning"] and not self.texts["answer"]:
                self._thought()
            sys.stdout.write("\n")
        sys.stdout.flush()

    def _think(self, piece: str) -> None:
        if self._reasoning == "show":
            sys.stdout.write(self._dimmed(piece))
        elif self._reasoning == "fold" and self._folds:
            self._status = f"{BACK}{self._dimmed(f'thinking, {self.tokens} tokens')}"
            sys.stdout.write(self._status)

    def _thought(self) -> None:
        """End the reasoning: the answer begins on a line of its own."""
        if self._reasoning == "show":
            sys.stdout.write("\n\n")
        elif self._reasoning == "fold" and sys.stdout.isatty():
            seconds = time.perf_counter() - self._started
            line = self._dimmed(f"thought for {seconds:.1f} s, {self.tokens} tokens")
            sys.stdout.write(f"{BACK if self._status else ''}{line}\n")

    def _dimmed(self, text: str) -> str:
        return dimmed(text) if self._dims else text
