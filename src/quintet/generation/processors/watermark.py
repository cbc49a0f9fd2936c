"""Watermarking: a hash of the text favours part of the vocabulary."""

import torch
from torch import Tensor

from quintet.generation.processors.base import LogitsProcessor
from quintet.generation.watermarking import WatermarkingConfig

_TABLE = 1_000_003
# How many of the likeliest tokens "selfhash" asks whether they favour themselves.
_TRIED = 40


class WatermarkLogitsProcessor(LogitsProcessor):
    """Adds a bias to tokens chosen by a hash of the text (arXiv:2306.04634).

    Args:
        vocab_size: V.
        device: where the permutations are drawn, which differ between kinds of device.
        greenlist_ratio: the share of the vocabulary that is favoured at each step.
        bias: what is added to their logits.
        hashing_key: who has it can tell a marked text.
        seeding_scheme: "lefthash" (algorithm 2) or "selfhash" (algorithm 3).
        context_width: how many tokens "selfhash" looks back.
    """

    def __init__(
        self,
        vocab_size: int,
        device: str | torch.device,
        greenlist_ratio: float = 0.25,
        bias: float = 2.0,
        hashing_key: int = 15485863,
        seeding_scheme: str = "lefthash",
        context_width: int = 1,
    ) -> None:
        WatermarkingConfig(
            greenlist_ratio=greenlist_ratio,
            seeding_scheme=seeding_scheme,
            context_width=context_width,
        )
        self.vocab_size = vocab_size
        self.greenlist_size = int(vocab_size * greenlist_ratio)
        self.bias = bias
        self.hash_key = hashing_key
        self.seeding_scheme = seeding_scheme
        self.context_width = context_width
        self.rng = torch.Generator(device).manual_seed(hashing_key)
        self.fixed_table = torch.randperm(
            _TABLE, generator=self.rng, device=device, dtype=torch.long
        )

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        begins = [0] * len(scores) if padding is None else padding.tolist()
        marked = scores.clone()
        for row, ids in enumerate(input_ids):
            ids = ids[begins[row] :]
            if len(ids) < self.context_width:
                continue
            chosen = (
                self._favouring_themselves(ids, scores[row])
                if self.seeding_scheme == "selfhash"
                else self.greenlist(ids)
            )
            marked[row, chosen] += self.bias
        return marked

    def greenlist(self, ids: Tensor) -> Tensor:
        """Return the favoured tokens after a text (T,)."""
        ids = ids[-self.context_width :]
        if self.seeding_scheme == "selfhash":
            hashed = self.fixed_table[ids % _TABLE] + 1
            last = self.fixed_table[ids[-1] % _TABLE] + 1
            seed = int((self.hash_key * hashed * last).min())
        else:
            seed = self.hash_key * int(ids[-1])
        self.rng.manual_seed(seed % (2**64 - 1))
        order = torch.randperm(
            self.vocab_size, device=ids.device, generator=self.rng, dtype=torch.long
        )
        return order[: self.greenlist_size]

    def _favouring_themselves(self, ids: Tensor, scores: Tensor) -> Tensor:
        tried = scores.topk(min(_TRIED, len(scores))).indices
        chosen = [t for t in tried if bool((self.greenlist(torch.cat((ids, t[None]))) == t).any())]
        return torch.stack(chosen) if chosen else tried[:0]
