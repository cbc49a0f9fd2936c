"""A tokenizer's vocabulary for grammars: bytes of tokens, and which are no text."""

import json
from collections.abc import Sequence

from llguidance import LLTokenizer

from quintet.errors import InputError, TokenizerError, shown
from quintet.tokenization import PreTrainedTokenizer

UNICODE_FORMS = frozenset(("NFC", "NFD", "NFKC", "NFKD"))


class GrammarVocabulary:
    """The vocabulary for grammars, built once per tokenizer.

    Tokens that were added to the vocabulary are none of any text, be they special or not: what
    spells one is made of others. A grammar has them where it names them.

    Args:
        tokenizer: knows the tokens; what is added to it later is not seen.
        vocab_size: how many tokens the model knows; all if not given.
        eos_token_id: what ends a text; the tokenizer's own if not given.

    Attributes:
        size: how many tokens there are; those that only pad the embeddings are not among them.
        words: how many int32 have a bit for each token of the tokenizer.
        ends: those that end a text.
        table: what llguidance makes of them.

    Raises:
        InputError: there is no token that ends a text.
        TokenizerError: the tokenizer is of a kind whose tokens have no bytes of their own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        vocab_size: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        known = tokenizer.get_vocab()
        size = max(known.values(), default=-1) + 1
        self.size = size if vocab_size is None else min(size, vocab_size)
        self.words = -(-size // 32)
        given = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        ends = [given] if isinstance(given, int) else list(given or ())
        self.ends = tuple(dict.fromkeys(one for one in ends if 0 <= one < self.size))
        if not self.ends:
            raise InputError(
                f"eos_token_id={shown(given)} names no token of the vocabulary, and a text that "
                "follows a grammar has to end; pass eos_token_id"
            )
        self._ids = known
        try:
            self.table = LLTokenizer(_pipeline(tokenizer), n_vocab=size, eos_token=[*self.ends])
        except ValueError as error:
            raise TokenizerError(
                f"grammars cannot read this tokenizer: {shown(str(error))}; they need one whose "
                "tokens are bytes or pieces of text"
            ) from None

    def token(self, text: str) -> int | None:
        """Return the id of a single token, or None."""
        found = self._ids.get(text)
        return found if found is not None and found < self.size else None


def _pipeline(tokenizer: PreTrainedTokenizer) -> str:
    """Return a tokenizer file in which every token that is no text is special."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in pipeline.get("added_tokens") or ()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index in tokenizer.all_special_ids:
        content = tokenizer.convert_ids_to_tokens(index)
        added.setdefault(index, {"id": index, "content": content, **plain})
    pipeline["added_tokens"] = [added[index] | {"special": True} for index in sorted(added)]
    # What a grammar forces is written as it is, also where a tokenizer would read it otherwise.
    if (pipeline.get("normalizer") or {}).get("type") in UNICODE_FORMS:
        pipeline["normalizer"] = None
    return json.dumps(pipeline)
