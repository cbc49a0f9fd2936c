"""Drafts by an assistant: a smaller model with the same vocabulary."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.cache import Cache
from quintet.generation.decode import LanguageModel
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft, DraftWriter
from quintet.generation.token_buffer import TokenBuffer


class DraftModel:
    """Drafts with an assistant model.

    Args:
        model: the smaller model.
        cache: an empty cache of its own.
        known: how many ids the assistant knows; others are read as its last one.
        vocab_size: V of the model that is assisted; what the assistant lacks is never drafted.
        threshold: a draft ends with a token that is less probable than that.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        *,
        known: int,
        vocab_size: int,
        threshold: float,
    ) -> None:
        self.model = model
        self.known = known
        self.cache = cache
        self.vocab_size = vocab_size
        self.threshold = threshold
        cache.in_fused_session = True
        self._cached: list[int] | None = None

    def propose(
        self, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Sampler
    ) -> Draft:
        """Draft with the assistant, after it has read the new tokens."""
        logits = self._read(text, unfinished)
        self.cache.snapshot()
        writer = DraftWriter(text, wanted, sampler, self.threshold)
        device = text.ids.device
        rows = None
        if not all(unfinished):
            rows = torch.tensor(unfinished, device=device, dtype=torch.bool)[:, None]
        while True:
            token = writer.write(logits)
            if writer.done:
                return writer.draft()
            logits = self._run(token[:, None], rows)

    def accepted(self, counts: list[int]) -> None:
        """Do nothing: a draft follows from the text."""

    def finish(self, text: TokenBuffer) -> None:
        """Do nothing: the cache is this object's."""

    def close(self) -> None:
        """Do nothing."""

    def _read(self, text: TokenBuffer, unfinished: list[bool]) -> Tensor:
        """Run the tokens that the cache lacks; finished rows stay as they are."""
        T, lengths, device = len(text), text.lengths().tolist(), text.ids.device
        new = lengths
        if self._cached is not None:
            cached = self.cache.lengths(len(lengths)).tolist()
            # The last token is always read again, as it is what the next one follows from.
            starts = [
                min(cached_length, length - 1) if active else before
                for cached_length, length, active, before in zip(
                    cached, lengths, unfinished, self._cached, strict=True
                )
            ]
            self.cache.crop(
                starts[0]
                if len(starts) == 1
                else torch.tensor(starts, device=device, dtype=torch.long)
            )
            new = [
                length - start if active else 0
                for length, start, active in zip(lengths, starts, unfinished, strict=True)
            ]
        width, mask = max(new), None
        if min(new) < width:
            columns = torch.arange(width, device=device, dtype=torch.long)
            mask = columns >= width - torch.tensor(new, device=device, dtype=torch.long)[:, None]
        logits = self._run(text.ids[:, T - width :], mask)
        self._cached = self.cache.lengths(len(lengths)).tolist()
        return logits

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        logits = self.model(
            ids if self.known >= self.vocab_size else ids.clamp(max=self.known - 1),
            mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits[:, -1]
        lacking = self.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, lacking), value=-torch.inf) if lacking else logits
