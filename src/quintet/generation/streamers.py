"""Where tokens go as they are made."""

import sys
from typing import Protocol, TextIO

from torch import Tensor

from quintet.errors import InputError
from quintet.tokenization import IncrementalDecoder, PreTrainedTokenizer

__all__ = ["Streamer", "TextStreamer"]


class Streamer(Protocol):
    """What `generate(streamer=…)` takes."""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T) first, then the token of each step (1,)."""
        ...

    def end(self) -> None:
        """Take note that there are no more."""
        ...


class TextStreamer:
    """Writes text as it is made, never half a character.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: write what is generated, not the prompt.
        skip_special_tokens: leave out tokens that are not text.
        file: where to write; standard output if not given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
        file: TextIO | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self.file = file
        self._decoder: IncrementalDecoder | None = None

    def put(self, value: Tensor) -> None:
        """Write the text that is certain by now.

        Raises:
            InputError: there is more than one row.
        """
        if value.ndim > 1 and value.shape[0] != 1:
            raise InputError(f"a TextStreamer takes one row, not {value.shape[0]}")
        if self._decoder is None:
            self._decoder = IncrementalDecoder(
                self.tokenizer, skip_special_tokens=self.skip_special_tokens
            )
            if self.skip_prompt:
                return
        self.on_text(self._decoder.push(value.reshape(-1).tolist()))

    def end(self) -> None:
        """Write the rest and a line end, unless nothing was put."""
        if self._decoder is None:
            return
        rest, self._decoder = self._decoder.flush(), None
        self.on_text(rest, stream_end=True)

    def on_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text; a subclass may send it elsewhere."""
        out = sys.stdout if self.file is None else self.file
        out.write(text + ("\n" if stream_end else ""))
        out.flush()
