"""A sequence: a text under way, its sampler, its end and its reader."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.ahead import Ahead
from quintet.generation.observing import Observed
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import DraftWriter
from quintet.generation.speculative.drafting import Drafting, PredictedDrafting
from quintet.generation.stopping import Stopping
from quintet.generation.streamers import Streamer
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import NothingLeftError


class Sequence:
    """One text under way, with all its state except its row in the cache.

    So it can leave an engine between any two steps and go on later, in that engine or another, as
    if it had stayed.

    Args:
        prompt: the ids it begins with, at least one.
        sampler: chooses its tokens; of a single row.
        stopping: what ends it before there is no room for more.
        max_new_tokens: how many tokens it gets at the most.
        streamer: gets the prompt now, and every token as it is made.
        drafting: drafts tokens for it, of which a step checks several; None for one at a time.

    Attributes:
        ids: all its ids so far.
        prompt_length: how many of them are the prompt.
        computed: how many of them an engine has run over.
        ahead: the logits behind the last of them, if an engine has run over it before it was read;
            then its row holds that, too.
        adapter_name: the adapter that it is made with; None for what the model uses.
        observed: what is taken down of its forwards; None for nothing.
        listener: told each token as it is made and whether that is an end token; tells whether the
            text ends here. None for nobody.
        only_reads: whether it ends with its prompt, of which nothing follows.
        finish_reason: "stop" for an end token or a criterion, "length" where there is no room for
            more, "cancelled", "error" where `error` tells what went wrong; None while it goes on.
        error: why it ended with "error".

    Raises:
        InputError: the prompt is empty, or there is no room for a token.
    """

    def __init__(
        self,
        prompt: list[int],
        sampler: Sampler,
        stopping: Stopping,
        max_new_tokens: int,
        streamer: Streamer | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        if not prompt or max_new_tokens < 1:
            raise InputError(
                f"a sequence of {len(prompt)} tokens with room for {max_new_tokens} more cannot go "
                "on; it needs a prompt, and room for at least one token"
            )
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0
        self.sampler, self.max_new_tokens, self.streamer = sampler, max_new_tokens, streamer
        self.drafting = drafting
        self.ahead: Ahead | None = None
        self.adapter_name: str | None = None
        self.observed: Observed | None = None
        self.listener: Callable[[int, bool], bool] | None = None
        self.only_reads = False
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._cancelled = False
        self._ends = frozenset(stopping.eos.tolist())
        self._criteria = stopping.criteria
        self._text = TokenBuffer(stopping.eos.new_tensor([self.ids]), reserve=max_new_tokens)
        if streamer is not None:
            streamer.put(self._text.ids.cpu())

    @property
    def new(self) -> list[int]:
        """The generated ids."""
        return self.ids[self.prompt_length :]

    @property
    def waiting(self) -> int:
        """The number of ids not run yet."""
        return len(self.ids) - self.computed

    @property
    def left(self) -> int:
        """The number of tokens it may still get."""
        return self.max_new_tokens - (len(self.ids) - self.prompt_length)

    @property
    def finished(self) -> bool:
        """Whether generation has ended."""
        return self._cancelled or self.finish_reason is not None

    @property
    def text(self) -> TokenBuffer:
        """The ids as a tensor, (1, T)."""
        for token in self.ids[len(self._text) :]:
            self._text.append(token)
        return self._text

    def draft(self) -> list[int]:
        """Return drafted tokens to check; none after a prompt."""
        if self.drafting is None or len(self.ids) == self.prompt_length or not self.drafting.awake:
            return []
        try:
            return self.drafting.propose(self.text, self.sampler, self.left, self._ends)
        except Exception as error:
            self.fail(error)
            return []

    def begin_draft(self) -> DraftWriter | None:
        """Return the writer of the next draft, if prediction layers draft."""
        if (
            not isinstance(self.drafting, PredictedDrafting)
            or len(self.ids) == self.prompt_length
            or self.finished
        ):
            return None
        try:
            return self.drafting.begin(self.text, self.sampler, self.left)
        except Exception as error:
            self.fail(error)
            return None

    @property
    def checks(self) -> bool:
        """Whether the next tokens come from checking a draft, even an empty one.

        A row that draws by a generator of its own does so by turns, as it would alone.
        """
        drafting = self.drafting
        return drafting is not None and (drafting.pacing is None or drafting.drafted)

    @property
    def steps_singly(self) -> bool:
        """Whether each step is one token, run as the model is for all."""
        return self.drafting is None and self.adapter_name is None

    def take_checked(self, logits: Tensor) -> None:
        """Append the accepted draft and the next token, from logits (K + 1, V)."""
        assert self.drafting is not None
        try:
            checked = self.drafting.check(self.text, self.sampler, logits)
        except Exception as error:
            self.fail(error)
            return
        before, tokens = len(self.ids), checked.tokens[0]
        for token, best in zip(tokens, checked.best[0], strict=False):
            if not -math.inf < best < math.inf:
                self.fail(NothingLeftError(0, best, len(self.ids) - self.prompt_length + 1))
            if self.finished:
                break
            self.take(token)
        self.drafting.taken(len(self.ids) - before, checked.accepted[0])

    def take(self, token: int) -> None:
        """Append a token, stream it, and check whether the sequence ends."""
        self.ids.append(token)
        try:
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token], dtype=torch.long, device="cpu"))
            ends = token in self._ends
            if self._criteria:
                ends |= bool(self._criteria(self.text.ids, None))
            if self.listener is not None:
                ends |= self.listener(token, token in self._ends)
        except Exception as error:
            self.fail(error)
            return
        if ends:
            self._finish("stop")
        elif len(self.ids) - self.prompt_length == self.max_new_tokens:
            self._finish("length")

    def note(self, logits: Tensor, tokens: list[int]) -> None:
        """Record the logits (n, V) of new tokens, if requested."""
        if self.observed is not None:
            try:
                self.observed.took(logits, tokens)
            except Exception as error:
                self.fail(error)

    def has_read(self) -> None:
        """End the sequence if only its prompt was to be read."""
        if not self.finished:
            self._finish("length")

    def fail(self, error: Exception) -> None:
        """End the sequence with an error of its own."""
        self.error = error
        self._finish("error")

    def cancel(self) -> None:
        """Request the end, from any thread; the engine's thread carries it out."""
        self._cancelled = True

    def apply_cancellation(self) -> None:
        """Carry out a requested end; engines call this before a step and on removal."""
        if self._cancelled and self.finish_reason is None:
            self._finish("cancelled")

    @property
    def watched(self) -> Observed | None:
        """The observer of the prompt while it is read, else None."""
        return self.observed if self.observed is not None and self.observed.reads else None

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.streamer is not None:
            try:
                self.streamer.end()
            except Exception as error:
                self.error = error if self.error is None else self.error
                self.finish_reason = "error"
