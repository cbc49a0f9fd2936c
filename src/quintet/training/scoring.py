"""Scores texts: -log2 p of every token, with as much context as the model has."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.mtp import MtpCausalLMHead
from quintet.ops.labels import IGNORED
from quintet.tokenization import LongTextWarning, PreTrainedTokenizer
from quintet.training.data.interface import Document

# How many tokens have logits at once: with a vocabulary of 150,000 they take 150 MB.
LOGITS = 256


@dataclass(frozen=True, slots=True)
class Predicted:
    """The predictions for consecutive tokens.

    Attributes:
        first: where the first of them is in its text.
        targets: (N,) the tokens themselves.
        logits: (N, V) of each, given all before it that the model sees, in float32.
        ahead: (N,) the likeliest of each to the prediction layer, which has not seen the token
            before it, -1 where there is none; None without such a layer.
    """

    first: int
    targets: Tensor
    logits: Tensor
    ahead: Tensor | None = None

    def bits(self) -> Tensor:
        """Return -log2 p of each token, (N,), in float64."""
        nats = F.cross_entropy(self.logits, self.targets, reduction="none")
        return nats.to(torch.float64) / math.log(2)


@dataclass(slots=True)
class Score:
    """The total score of texts.

    Attributes:
        bits: -log2 p of all tokens that count.
        scored: how many tokens these are.
        bytes: how many bytes the texts have, of those of which every token counts.
        parts: how many texts count in part only.
        agreed: for how many tokens the prediction layer named what the model itself would take.
        compared: how many tokens both named one for.
    """

    bits: float = 0.0
    scored: int = 0
    bytes: int = 0
    parts: int = 0
    agreed: int = 0
    compared: int = 0

    @property
    def bits_per_token(self) -> float:
        """The mean of -log2 p."""
        return self.bits / self.scored if self.scored else 0.0

    @property
    def bits_per_byte(self) -> float | None:
        """Bits over the bytes of the texts; None if some count in part only."""
        return self.bits / self.bytes if self.bytes and not self.parts else None

    @property
    def agreement(self) -> float | None:
        """The share of tokens for which the prediction layer agreed; None without one."""
        return self.agreed / self.compared if self.compared else None


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, stop): the tokens from first up to stop are predicted from start on.

    Every token of a text but its first is in one of them. Windows of `context` tokens overlap by
    half, and a token is predicted where it has the most before it.

    Raises:
        InputError: a context of fewer than two tokens.
    """
    if context < 2:
        raise InputError(f"context={context}: a token is predicted from one before it, at least")
    first = 1
    while first < length:
        start = 0 if first == 1 else first - context // 2
        stop = min(start + context, length)
        yield start, first, stop
        first = stop


def predictions(
    model: CausalLMHead, ids: Tensor, context: int, **options: Any
) -> Iterator[Predicted]:
    """Yield a model's scores of the tokens of a text (T,), some at a time, in order.

    `options` are those of the base model's forward, such as a cache for the first window.
    """
    for start, first, stop in windows(len(ids), context):
        window = ids[start : stop - 1][None].to(model.device)
        with torch.no_grad():
            hidden, ahead = _states(model, window, options)
        for begin in range(first, stop, LOGITS):
            until = min(begin + LOGITS, stop)
            places = torch.arange(
                begin - 1 - start, until - 1 - start, device=window.device, dtype=torch.long
            )
            with torch.no_grad():
                logits = model.logits_of(hidden, places)[0].to(torch.float32)
                named = None if ahead is None else _named(model, ahead, places - 1)
            yield Predicted(begin, ids[begin:until].to(logits.device), logits, named)


def _states(
    model: CausalLMHead, window: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return the states (1, T, C) of a window, and those of the first prediction layer."""
    looks_ahead = isinstance(model, MtpCausalLMHead) and model.prediction_depth() > 0
    looks_ahead = looks_ahead and model.ends_here
    output = model.base_model(
        input_ids=window,
        return_dict=True,
        output_hidden_states=looks_ahead,
        **{"use_cache": False, **options},
    )
    hidden: Tensor = output.last_hidden_state
    if not looks_ahead:
        return hidden, None
    assert isinstance(model, MtpCausalLMHead)
    embeds = output.hidden_states[0]
    return hidden, model.model.look_ahead(hidden, embeds, None, None)[0]


def _named(model: CausalLMHead, ahead: Tensor, places: Tensor) -> Tensor:
    """Return the likeliest token at each place of the prediction layer's states, or -1."""
    likeliest = model.logits_of(ahead, places.clamp(min=0))[0].argmax(-1)
    return likeliest.masked_fill(places < 0, -1)


def score(model: CausalLMHead, documents: Iterable[Document], context: int | None = None) -> Score:
    """Score a model on texts, each alone and from its first token on.

    Where another process has the last layer, only the tokens are counted here.

    Args:
        model: as it is: `eval()` and its adapters are the caller's.
        documents: the texts.
        context: how many tokens a window has; None for as many as the model has positions for.
    """
    total = Score()
    most = model.config.max_position_embeddings
    if context is not None and context > most:
        raise InputError(
            f"context={context} is more than the {most} tokens that this model has positions for "
            "(max_position_embeddings)"
        )
    for document in documents:
        total.bytes += document.bytes
        total.parts += document.bytes == 0
        counts = document.labels != IGNORED
        for piece in predictions(model, document.input_ids, context or most):
            mask = counts[piece.first : piece.first + len(piece.targets)]
            if piece.logits.is_meta:
                # They are where the last layer is.
                total.scored += int(mask.sum())
                continue
            mask = mask.to(piece.logits.device)
            total.bits += float(piece.bits()[mask].sum())
            total.scored += int(mask.sum())
            if piece.ahead is not None:
                predicted = mask & (piece.ahead >= 0)
                total.agreed += int((piece.logits.argmax(-1) == piece.ahead)[predicted].sum())
                total.compared += int(predicted.sum())
    return total


def text_document(tokenizer: PreTrainedTokenizer, text: str, name: str = "") -> Document:
    """Return a whole text as a document: it begins as a new text does, and every byte counts.

    Raises:
        InputError: the tokenizer has no token that a text begins with, or the one before ends with.
    """
    opening = tokenizer.bos_token_id
    opening = tokenizer.eos_token_id if opening is None else opening
    if opening is None:
        raise InputError(
            "the tokenizer has neither a bos_token nor an eos_token; without one the first token "
            "of a text cannot be predicted, and bits per byte would leave it out"
        )
    with warnings.catch_warnings():
        # Windows are cut later.
        warnings.simplefilter("ignore", LongTextWarning)
        ids = torch.tensor(
            [opening, *tokenizer(text, add_special_tokens=False)["input_ids"]],
            dtype=torch.long,
            device="cpu",
        )
    labels = ids.clone()
    labels[0] = IGNORED
    return Document(input_ids=ids, labels=labels, bytes=len(text.encode()), name=name)
