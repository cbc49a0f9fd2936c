"""Token healing: the model may choose again how a prompt's last token ends.

A prompt may end in the middle of what the tokenizer would make one token: behind a colon a line
break is rare, because colon and line break together are a token of their own. So the last token is
taken off, and the first one that is generated has to begin with the same text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.processors.base import LogitsProcessor, row_lengths
from quintet.generation.prompt import Prompt
from quintet.generation.token_buffer import TokenBuffer
from quintet.tokenization import PreTrainedTokenizer


class HealedTokenLogitsProcessor(LogitsProcessor):
    """Allows only given tokens as the first new token.

    Args:
        allowed: (B, V) True for what may come behind each prompt.
        prompt_length: the length of the prompts, an int or (B,).
    """

    def __init__(self, allowed: Tensor, prompt_length: int | Tensor) -> None:
        self.allowed = allowed
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        copies = scores.shape[0] // self.allowed.shape[0]
        begin = self.prompt_length
        if isinstance(begin, Tensor):
            begin = begin.repeat_interleave(copies)
        first = row_lengths(input_ids, padding) == begin
        if first is False:
            return scores
        banned = ~self.allowed.repeat_interleave(copies, dim=0)
        if isinstance(first, Tensor):
            banned &= first[:, None]
        return scores.masked_fill(banned, -torch.inf)


@dataclass(frozen=True, slots=True)
class Healing:
    """Prompts without their last token, and the processors that heal them.

    Attributes:
        prompt: the shorter prompts.
        processors: what takes care of the first new tokens.
        as_given: (B,) True for rows of a single token, which are left as they are and so get a
            token less than the others; None if all rows are alike.
    """

    prompt: Prompt
    processors: list[LogitsProcessor]
    as_given: Tensor | None = None


def heal(prompt: Prompt, tokenizer: PreTrainedTokenizer | None, vocab_size: int) -> Healing:
    """Remove the last token of each prompt that has more than one.

    Raises:
        InputError: there is no tokenizer, or the prompt is given as embeddings.
    """
    if tokenizer is None:
        raise InputError("token_healing=True needs the tokenizer: generate(tokenizer=…)")
    if prompt.inputs.ndim == 3:
        raise InputError("token_healing=True needs ids, and inputs_embeds is given")
    single = TokenBuffer(prompt.ids, prompt.padding).lengths() < 2
    if bool(single.all()):
        return Healing(prompt, [])
    any_single = bool(single.any())
    B, T = prompt.ids.shape
    columns = torch.arange(T - 1, device=single.device, dtype=torch.long).repeat(B, 1)
    columns[single, -1] = T - 1
    padding = prompt.padding
    if padding is not None:
        padding = padding - single.long()
    ids = prompt.ids.gather(1, columns)
    positions = None if prompt.positions is None else prompt.positions.gather(1, columns)
    allowed = _beginning_alike(prompt.ids[:, -1], tokenizer, vocab_size)
    allowed[single] = True
    length = T - 1 if padding is None else T - 1 - padding
    return Healing(
        Prompt(ids, ids, ids, padding, prompt.before, positions),
        [HealedTokenLogitsProcessor(allowed, length)],
        single if any_single else None,
    )


def _beginning_alike(last: Tensor, tokenizer: PreTrainedTokenizer, vocab_size: int) -> Tensor:
    """Return the tokens that start with the text of each row's last token, (B, V) bool."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    texts = {token: text for text, token in vocabulary.items()}
    allowed = torch.zeros(len(last), vocab_size, dtype=torch.bool, device="cpu")
    for row, token in enumerate(last.tolist()):
        allowed[row, token] = True
        if token in special or token not in texts:
            continue
        begins = [i for text, i in vocabulary.items() if text.startswith(texts[token])]
        allowed[row, [i for i in begins if i not in special and i < vocab_size]] = True
    return allowed.to(last.device)
