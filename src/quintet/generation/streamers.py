"""Streamers: consumers of tokens as they are generated."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from queue import Queue
from typing import Protocol, TextIO, runtime_checkable

from torch import Tensor

from quintet.errors import InputError
from quintet.tokenization import IncrementalDecoder, PreTrainedTokenizer

__all__ = [
    "AsyncTextIteratorStreamer",
    "BaseStreamer",
    "Streamer",
    "TextIteratorStreamer",
    "TextStreamer",
]


@runtime_checkable
class Streamer(Protocol):
    """Interface of `generate(streamer=…)`."""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T) first, then the token of each step (1,)."""
        ...

    def end(self) -> None:
        """Called after the last token, or after a failure."""
        ...


class BaseStreamer:
    """A base class for streamers."""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T) first, then the token of each step (1,)."""
        raise NotImplementedError(f"{type(self).__name__} has to define put(value)")

    def end(self) -> None:
        """Called after the last token, or after a failure."""
        raise NotImplementedError(f"{type(self).__name__} has to define end()")


class TextStreamer(BaseStreamer):
    """Prints text as it is generated, in whole characters.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: write what is generated, not the prompt.
        skip_special_tokens: leave out tokens that are not text.
        clean_up_tokenization_spaces: take out spaces before punctuation; as the tokenizer does
            if not given.
        file: where to write; standard output if not given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        file: TextIO | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.file = file
        self._decoder: IncrementalDecoder | None = None

    def put(self, value: Tensor) -> None:
        """Write the text that is final so far.

        Raises:
            InputError: there is more than one row.
        """
        if value.ndim > 1 and value.shape[0] != 1:
            raise InputError(f"a TextStreamer takes one row, not {value.shape[0]}")
        if self._decoder is None:
            self._decoder = IncrementalDecoder(
                self.tokenizer,
                skip_special_tokens=self.skip_special_tokens,
                clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
            )
            if self.skip_prompt:
                return
        self.on_finalized_text(self._decoder.push(value.reshape(-1).tolist()))

    def end(self) -> None:
        """Write the rest and a newline, unless nothing was put."""
        if self._decoder is None:
            return
        rest, self._decoder = self._decoder.flush(), None
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text; subclasses may redirect it."""
        out = sys.stdout if self.file is None else self.file
        out.write(text + ("\n" if stream_end else ""))
        out.flush()


class _Handing(TextStreamer):
    """Passes text to a reader through a queue, and None at the end."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            skip_prompt,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )
        self.timeout = timeout
        self._open = True
        self._begin()

    def put(self, value: Tensor) -> None:
        """Take ids, and pass on the text that is final so far."""
        self._open = True
        super().put(value)

    def end(self) -> None:
        """Pass on the rest and the end mark."""
        super().end()
        if self._open:
            self._open = False
            self._send(None)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put a piece of text into the queue."""
        self._send(text)

    def _begin(self) -> None:
        raise NotImplementedError

    def _send(self, piece: str | None) -> None:
        raise NotImplementedError


class TextIteratorStreamer(_Handing):
    """Iterates over text from a thread other than that of `generate()`.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: give what is generated, not the prompt.
        timeout: seconds to wait for the next piece, then `queue.Empty` is raised; None for ever.
        skip_special_tokens: leave out tokens that are not text.
        clean_up_tokenization_spaces: take out spaces before punctuation; as the tokenizer does
            if not given.
    """

    def _begin(self) -> None:
        self.text_queue: Queue[str | None] = Queue()

    def _send(self, piece: str | None) -> None:
        self.text_queue.put(piece)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


class AsyncTextIteratorStreamer(_Handing):
    """Iterates asynchronously over text, in the event loop that created it.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: give what is generated, not the prompt.
        timeout: seconds to wait for the next piece, then `TimeoutError` is raised; None for ever.
        skip_special_tokens: leave out tokens that are not text.
        clean_up_tokenization_spaces: take out spaces before punctuation; as the tokenizer does
            if not given.

    Raises:
        RuntimeError: it is made outside of a running event loop.
    """

    def _begin(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.text_queue: asyncio.Queue[str | None] = asyncio.Queue()

    def _send(self, piece: str | None) -> None:
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, piece)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            piece = await self.text_queue.get()
        if piece is None:
            raise StopAsyncIteration
        return piece
