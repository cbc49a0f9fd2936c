"""Token healing: let the model choose again how the last token of a prompt ends.

A prompt may end in the middle of what the tokenizer would make one token: behind a colon a line
break is rare, because colon and line break together are a token of their own. So the last token is
taken off, and the first one that is generated has to begin with the same text.
"""

import torch
from torch import Tensor

from quintet.generation.processors.base import LogitsProcessor, row_lengths
from quintet.generation.text import Text
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["HealedTokenLogitsProcessor", "heal"]


class HealedTokenLogitsProcessor(LogitsProcessor):
    """Allows only given tokens to be the first behind a prompt.

    Args:
        allowed: (B, V) True for what may come behind each prompt.
        prompt_length: the length of the prompts, an int or (B,).
    """

    def __init__(self, allowed: Tensor, prompt_length: int | Tensor) -> None:
        self.allowed = allowed
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        first = row_lengths(input_ids, padding) == self.prompt_length
        if first is False:
            return scores
        copies = scores.shape[0] // self.allowed.shape[0]
        banned = ~self.allowed.repeat_interleave(copies, dim=0)
        banned = banned if first is True else banned & first[:, None]
        return scores.masked_fill(banned, -torch.inf)


def heal(
    prompt: Text, tokenizer: PreTrainedTokenizer, vocab_size: int
) -> tuple[Text, Tensor | None]:
    """Return the prompt without its last tokens, and what may come first, (B, V) of True.

    A prompt with a row of a single token is left as it is, with None.
    """
    if int(prompt.lengths().min()) < 2:
        return prompt, None
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    texts = {token: text for text, token in vocabulary.items()}
    allowed = torch.zeros(prompt.ids.shape[0], vocab_size, dtype=torch.bool)
    for row, last in enumerate(prompt.ids[:, -1].tolist()):
        allowed[row, last] = True
        if last in special or last not in texts:
            continue
        begins = [i for text, i in vocabulary.items() if text.startswith(texts[last])]
        allowed[row, [i for i in begins if i not in special and i < vocab_size]] = True
    return prompt.cut(len(prompt) - 1), allowed.to(prompt.ids.device)
