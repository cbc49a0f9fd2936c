"""Compiles constraints to logits processors."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from quintet.errors import GrammarError, InputError, shown
from quintet.grammar.compiled import Compiled
from quintet.grammar.constraints import Constraint
from quintet.grammar.processor import GrammarProcessor
from quintet.grammar.vocabulary import GrammarVocabulary
from quintet.tokenization import PreTrainedTokenizer

# So many tokens are tried before a grammar counts as usable: some are too complex only then.
TRIED = 8
# So many tokens may those that are kept have followed together: what they remember of texts is up
# to 130 kB a token.
FOLLOWED = 8_192


class Grammars:
    """Compiles and caches constraints for one tokenizer; thread-safe.

    Args:
        tokenizer: of the model.
        vocab_size: how many tokens the model knows; all of the tokenizer's if not given.
        eos_token_id: what ends a text; the tokenizer's own if not given.
        kept: how many compiled grammars are kept.

    Raises:
        InputError: there is no token that ends a text.
        TokenizerError: the tokenizer is of a kind whose tokens have no bytes of their own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        vocab_size: int | None = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        kept: int = 256,
    ) -> None:
        self.vocabulary = GrammarVocabulary(tokenizer, vocab_size, eos_token_id)
        self._capacity = kept
        self._compiled: OrderedDict[tuple[Constraint, bool], Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compile(
        self, constraint: Constraint, *, after: int | str | None = None
    ) -> GrammarProcessor:
        """Return a logits processor for a constraint.

        Args:
            constraint: what the text may be.
            after: a token, or its text; what comes before it is free, as reasoning is before
                "</think>". Without it a text does not end.

        Raises:
            GrammarError: the constraint is wrong, contradicts itself or is too complex.
            InputError: `after` is no token.
        """
        begin = self._token(after)
        return GrammarProcessor(self._find(constraint, begin is not None), self.vocabulary, begin)

    def _token(self, after: int | str | None) -> int | None:
        if after is None:
            return None
        found = self.vocabulary.token(after) if isinstance(after, str) else after
        if found is None or not 0 <= found < self.vocabulary.size:
            raise InputError(
                f"after={shown(after)} is no token of this vocabulary; name one that the model "
                "writes before its answer"
            )
        return found

    def _find(self, constraint: Constraint, apart: bool) -> Compiled:
        key = (constraint, apart)
        with self._lock:
            self._forget_grown()
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        compiled = self._compile(constraint, apart)
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        return compiled

    def _forget_grown(self) -> None:
        """Drop the most used ones until their lexers fit the limit."""
        total = sum(one.followed for one in self._compiled.values())
        while total > FOLLOWED:
            key = max(self._compiled, key=lambda key: self._compiled[key].followed)
            total -= self._compiled.pop(key).followed

    def _compile(self, constraint: Constraint, apart: bool) -> Compiled:
        grammars: list[dict[str, Any]] = constraint.grammar(self.vocabulary)
        if apart:
            # Behind its thoughts a model breaks the line, once or twice.
            grammars[0]["name"] = "answer"
            grammars.insert(0, {"lark_grammar": "start: /\\n{0,2}/ @answer"})
        compiled = Compiled(json.dumps({"grammars": grammars}), self.vocabulary)
        reason = compiled.fault or self._fault(compiled.begin())
        if reason:
            raise GrammarError(f"the {constraint.kind} cannot be used: {constraint.fault(reason)}")
        return compiled

    def _fault(self, matcher: LLMatcher) -> str:
        """Return the error of a grammar at its first tokens, or ""."""
        for _ in range(TRIED):
            # What takes long is done by this call, which lets other threads go on meanwhile.
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            for end in self.vocabulary.ends:
                mask &= ~(1 << end)
            if matcher.is_error() or not mask:
                break
            matcher.consume_token((mask & -mask).bit_length() - 1)
        return matcher.get_error()


def compile(
    constraint: Constraint,
    tokenizer: PreTrainedTokenizer,
    vocab_size: int | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    after: int | str | None = None,
) -> GrammarProcessor:
    """Return a logits processor for a constraint.

    It reads the whole tokenizer; for several constraints, make `Grammars` once. Arguments and
    errors are those of `Grammars` and its `compile`.
    """
    grammars = Grammars(tokenizer, vocab_size, eos_token_id=eos_token_id)
    return grammars.compile(constraint, after=after)
