"""Tokens of a model in this process, as texts at the terminal."""

import sys

from torch import Tensor

from quintet.cli.answer import AnswerPrinter
from quintet.cli.terminal import Waiting, harmless
from quintet.generation.streamers import TextStreamer
from quintet.parsing import parser_for
from quintet.tokenization import PreTrainedTokenizer


class Continuation(TextStreamer):
    """Writes a text and its continuation to standard output.

    Args:
        tokenizer: turns ids into text.
        echo: write the text, too.
        waiting: is over once something is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, echo: bool, waiting: Waiting) -> None:
        super().__init__(tokenizer, skip_prompt=not echo, skip_special_tokens=True)
        self._waiting = waiting
        self._shown = harmless if sys.stdout.isatty() else str

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of it."""
        if text or stream_end:
            self._waiting.stop()
        super().on_finalized_text(self._shown(text), stream_end)


class AnswerStreamer(TextStreamer):
    """Tells an answer its tokens and texts.

    Args:
        tokenizer: turns ids into text.
        prompt: what the model continues.
        answer: is told.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, prompt: str, answer: AnswerPrinter) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._parser = parser_for(tokenizer, prompt, tools=False)
        self._prompt_seen = False
        # No id: the text that is left at the end comes with none.
        self._token = -1

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            super().put(value)
            return
        for token in value.reshape(-1):
            self._answer.count()
            self._token = int(token)
            super().put(token)

    def end(self) -> None:
        """Write the rest."""
        self._token = -1
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer."""
        events = self._parser.feed(text, self._token)
        self._answer.feed(events + self._parser.flush() if stream_end else events)
        if stream_end:
            self._answer.end()
