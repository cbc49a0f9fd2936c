"""Drafts by a model's own layers of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, §2.2).

Layer k joins, at position t, what the layer before it made there (the main run, for k = 1) with the
embedding of token t + k, and predicts token t + k + 1. Its keys and values have a cache of their
own, which holds positions for which all these tokens are known; what drafted tokens left in it is
taken back.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.cache import Cache, Span
from quintet.generation.drafts import Draft, Writer
from quintet.generation.sampler import Sampler
from quintet.generation.text import Text
from quintet.ops.ragged import ragged

__all__ = ["Prediction", "Predictor"]


@runtime_checkable
class Predictor(Protocol):
    """What a model with prediction layers offers."""

    def prediction_depth(self) -> int:
        """Return how many prediction layers there are."""
        ...

    def prediction_cache(self) -> Cache:
        """Return an empty cache for them."""
        ...

    def predict(
        self, depth: int, states: Tensor, ahead: Tensor, span: Span, cache: Cache
    ) -> Tensor:
        """Return the states (B, W, C) of one prediction layer, 0 being the first."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., C) of ids."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        ...

    def watched(self) -> nn.Module:
        """Return the module whose output has the main run's states as `last_hidden_state`."""
        ...


class _Seen:
    """The main run's states and embeddings (B, W, C) at some columns, and which of them count."""

    def __init__(self, states: Tensor, embeds: Tensor, mask: Tensor) -> None:
        self.states, self.embeds, self.mask = states, embeds, mask

    def repeat(self, copies: int) -> "_Seen":
        return _Seen(
            self.states.repeat_interleave(copies, dim=0),
            self.embeds.repeat_interleave(copies, dim=0),
            self.mask.repeat_interleave(copies, dim=0),
        )


class Prediction:
    """Lets the prediction layers write the draft.

    Beyond their number, the last layer goes on with its own states, position by position, as
    serving engines do (EAGLE, arXiv:2401.15077).

    Args:
        model: runs them; its main run is watched from here on.
        main: the main run's cache, which has that of the layers beside it.
        threshold: a draft ends with a token that is less probable than that.
    """

    def __init__(self, model: Predictor, main: Cache, *, threshold: float) -> None:
        self.model = model
        self.main = main
        self.cache = _beside(main, model)
        self.threshold = threshold
        self._seen: list[_Seen] = []
        self._handle = model.watched().register_forward_hook(self._watch, with_kwargs=True)

    def propose(self, text: Text, wanted: Tensor, goes_on: Tensor, sampler: Sampler) -> Draft:
        """Draft by the prediction layers, which read first what the main run read."""
        last = text.ids[:, -1]
        states, ahead, counts = self._read(last, goes_on)
        B, W, _ = states.shape
        rows = torch.arange(B, device=last.device)
        at = (W if counts is None else counts) - 1
        writer = Writer(text, wanted * goes_on, sampler, self.threshold)
        depth = self.model.prediction_depth()
        span = self.cache.span(B, W, states.device, counts)
        for k in range(depth):
            if k:
                # The token that layer k - 1 has drafted is the one that layer k has not seen.
                ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))
                ahead[rows, at] = self.model.embed(writer.tokens[-1])
            states = self.model.predict(k, states, ahead, span, self.cache)
            here = states[rows, at]
            # Layers that are not asked for a token read the text all the same.
            if not writer.done:
                writer.write(self.model.logits(here))
        self.cache.advance(span)
        steps = 0
        while not writer.done:
            embeds = self.model.embed(writer.tokens[-1])[:, None]
            one = self.cache.span(B, 1, embeds.device, None)
            states = self.model.predict(depth - 1, here[:, None], embeds, one, self.cache)
            self.cache.advance(one)
            here = states[:, 0]
            writer.write(self.model.logits(here))
            steps += 1
        self._take_back(steps, counts, W)
        return writer.draft()

    def accepted(self, counts: Tensor) -> None:
        """Keep of the last forward what belongs to tokens that were taken."""
        seen = self._seen[-1]
        places = torch.arange(seen.mask.shape[1], device=counts.device)
        seen.mask = places < counts[:, None]

    def finish(self, text: Text) -> None:
        """Read what the main run read last, so that the next generation can go on from here."""
        everyone = torch.ones(len(text.ids), dtype=torch.bool, device=text.ids.device)
        states, ahead, counts = self._read(text.ids[:, -1], everyone)
        W = states.shape[1]
        span = self.cache.span(len(states), W, states.device, counts)
        for k in range(self.model.prediction_depth()):
            if k:
                # What lies further ahead is not there yet: those places are read again.
                ahead = F.pad(ahead[:, 1:], (0, 0, 0, 1))
            states = self.model.predict(k, states, ahead, span, self.cache)
        self.cache.advance(span)
        self._take_back(0, counts, W)
        self.main.ahead_until = self.main.lengths(len(text.ids)).clone()

    def close(self) -> None:
        """Stop watching the main run."""
        self._handle.remove()

    def _watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        states = output.last_hidden_state
        ids, embeds = kwargs["input_ids"], kwargs["inputs_embeds"]
        T = states.shape[1]
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        seen = self.model.embed(ids) if embeds is None else embeds
        self._seen.append(_Seen(states, seen, mask[:, -T:].to(torch.bool)))

    def _read(self, last: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return states and the embeddings ahead of them, (B, W, C), and how many count, (B,)."""
        seen = self._seen
        if len(seen[0].states) != len(last):
            seen = [one.repeat(len(last) // len(one.states)) for one in seen]
        states = torch.cat([one.states for one in seen], dim=1)
        embeds = torch.cat([one.embeds for one in seen], dim=1)
        mask = torch.cat([one.mask for one in seen], dim=1) & goes_on[:, None]
        rows = ragged(mask)
        counts = None
        if rows is not None:
            counts = rows.counts
            width = max(int(counts.max()), 1)
            states, embeds = rows.pack(states)[:, :width], rows.pack(embeds)[:, :width]
            mask = torch.arange(width, device=last.device) < counts[:, None]
        self._carry(states, embeds, mask)
        ahead = F.pad(embeds[:, 1:], (0, 0, 0, 1))
        at = states.shape[1] - 1 if counts is None else counts - 1
        ahead[torch.arange(len(last), device=last.device), at] = self.model.embed(last)
        return states, ahead, counts

    def _carry(self, states: Tensor, embeds: Tensor, mask: Tensor) -> None:
        """Keep the columns that deeper layers have to read again, knowing the tokens by then."""
        again = self.model.prediction_depth() - 1
        self._seen = []
        if again:
            from_end = mask.flip(1).to(torch.long).cumsum(dim=1).flip(1)
            self._seen.append(_Seen(states, embeds, mask & (from_end <= again)))

    def _take_back(self, steps: int, counts: Tensor | None, W: int) -> None:
        """Take what drafted tokens left in the cache out of it again."""
        again = self.model.prediction_depth() - 1
        if counts is None:
            if steps + min(again, W):
                self.cache.crop(-(steps + min(again, W)))
        elif steps or again:
            held = self.cache.lengths(len(counts), counts.device)
            self.cache.crop(held - steps - counts.clamp(max=again))


def _beside(main: Cache, model: Predictor) -> Cache:
    """Return the cache of the prediction layers that a main one has beside it.

    Where the main one was cropped in between, it is too; where the main one went on without the
    layers, they miss what they did not see, which costs them nothing but drafts.
    """
    if main.ahead is None:
        main.ahead = model.prediction_cache()
    elif main.ahead_until is not None:
        until, now = main.ahead_until, main.lengths(len(main.ahead_until))
        held = main.ahead.lengths(len(until))
        main.ahead.crop(held - (until - now).clamp(min=0))
    return main.ahead
