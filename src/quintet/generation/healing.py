"""Token healing: let the model choose again how the last token of a prompt ends.

A prompt may end in the middle of what the tokenizer would make one token: behind a colon a line
break is rare, because colon and line break together are a token of their own. So the last token is
taken off, and the first one that is generated has to begin with the same text.
"""

import torch
from torch import Tensor

from quintet.generation.decode import Prompt
from quintet.tokenization import PreTrainedTokenizer

__all__ = ["heal"]


def heal(
    prompt: Prompt, tokenizer: PreTrainedTokenizer, vocab_size: int
) -> tuple[Prompt, Tensor | None]:
    """Return the prompt without its last tokens, and what may come first, (B, V) of True.

    A prompt with a row of a single token is left as it is, with None.
    """
    ids, mask = prompt.ids, prompt.mask
    shortest = ids.shape[1] if mask is None else int(mask.sum(dim=1).min())
    if shortest < 2:
        return prompt, None
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    texts = {token: text for text, token in vocabulary.items()}
    allowed = torch.zeros(ids.shape[0], vocab_size, dtype=torch.bool)
    for row, last in enumerate(ids[:, -1].tolist()):
        allowed[row, last] = True
        if last in special or last not in texts:
            continue
        begins = [i for text, i in vocabulary.items() if text.startswith(texts[last])]
        allowed[row, [i for i in begins if i not in special and i < vocab_size]] = True
    shortened = Prompt(ids[:, :-1], None if mask is None else mask[:, :-1])
    return shortened, allowed.to(ids.device)
