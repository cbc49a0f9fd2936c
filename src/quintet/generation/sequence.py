"""A text under way: what it is so far, how its tokens are chosen, what ends it and who reads it."""

import torch

from quintet.errors import InputError
from quintet.generation.sampler import Sampler
from quintet.generation.stopping import Stopping
from quintet.generation.streamers import Streamer
from quintet.generation.text import Text

__all__ = ["Sequence"]


class Sequence:
    """One text that is generated; it owns all that is known of it but the rows of a cache.

    So it can leave an engine between any two steps and go on later, in that engine or another, as
    if it had stayed.

    Args:
        prompt: the ids it begins with, at least one.
        sampler: chooses its tokens; of a single row.
        stopping: what ends it before there is no room for more.
        room: how many tokens it gets at the most.
        streamer: gets the prompt now, and every token as it is made.

    Attributes:
        ids: all its ids so far.
        prompt_length: how many of them are the prompt.
        computed: how many of them an engine has run over.
        finish_reason: "stop" for an end token or a criterion, "length" where there is no room for
            more, "error" where `error` tells what went wrong; None while it goes on.
        error: why it ended with "error".

    Raises:
        InputError: the prompt is empty, or there is no room for a token.
    """

    def __init__(
        self,
        prompt: list[int],
        sampler: Sampler,
        stopping: Stopping,
        room: int,
        streamer: Streamer | None = None,
    ) -> None:
        if not prompt or room < 1:
            raise InputError(
                f"a sequence of {len(prompt)} tokens with room for {room} more cannot go on; it "
                "needs a prompt, and room for at least one token"
            )
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0
        self.sampler, self.room, self.streamer = sampler, room, streamer
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._ends = frozenset(stopping.eos.tolist())
        self._criteria = stopping.criteria
        self._text = Text(stopping.eos.new_tensor([self.ids]), room=room)
        if streamer is not None:
            streamer.put(self._text.ids.cpu())

    @property
    def new(self) -> list[int]:
        """The ids that were generated."""
        return self.ids[self.prompt_length :]

    @property
    def waiting(self) -> int:
        """How many of its ids have not been run over."""
        return len(self.ids) - self.computed

    @property
    def finished(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finish_reason is not None

    @property
    def text(self) -> Text:
        """The same ids as rows are read, (1, T)."""
        behind = len(self.ids) - len(self._text)
        if behind:
            self._text.append(self._text.ids.new_tensor([self.ids[-behind:]]))
        return self._text

    def take(self, token: int) -> None:
        """Add a token, hand it to the streamer, and take note if it is the last."""
        self.ids.append(token)
        try:
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            ends = token in self._ends
            if self._criteria:
                ends |= bool(self._criteria(self.text.ids, None))
        except Exception as error:
            self.fail(error)
            return
        if ends:
            self._finish("stop")
        elif len(self.ids) - self.prompt_length == self.room:
            self._finish("length")

    def fail(self, error: Exception) -> None:
        """End it, as something went wrong that is nobody else's affair."""
        self.error = error
        self._finish("error")

    def cancel(self) -> None:
        """End it before its end; its reader is told that there are no more."""
        if not self.finished:
            self._finish("cancelled")

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.streamer is not None:
            try:
                self.streamer.end()
            except Exception as error:
                self.error = error if self.error is None else self.error
                self.finish_reason = "error"
