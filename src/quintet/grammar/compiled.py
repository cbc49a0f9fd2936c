"""A compiled grammar, for any number of texts."""

from llguidance import LLMatcher

from quintet.grammar.faults import LIMITS
from quintet.grammar.vocabulary import GrammarVocabulary


class Compiled:
    """Matchers at the start of a grammar.

    They share a lexer, which remembers every state that any of their texts came to: the next text
    is faster by that, and memory grows, up to a limit at which the lexer refuses. It is compiled
    anew then.

    Args:
        grammar: as llguidance reads it.
        vocabulary: the tokens.

    Attributes:
        followed: how many tokens it has followed in all texts, by which the lexer may have grown.
    """

    def __init__(self, grammar: str, vocabulary: GrammarVocabulary) -> None:
        self._grammar, self._table = grammar, vocabulary.table
        self._matcher = self._new_matcher()
        self.followed = 0

    @property
    def fault(self) -> str:
        """The reason why it cannot be used, or ""."""
        return self._matcher.get_error()

    def begin(self) -> LLMatcher:
        """Return a matcher for a new text."""
        return self._matcher.deep_copy()

    def begin_anew(self) -> LLMatcher:
        """Return a matcher with a fresh lexer."""
        self._matcher, self.followed = self._new_matcher(), 0
        return self.begin()

    def _new_matcher(self) -> LLMatcher:
        return LLMatcher(self._table, self._grammar, limits=LIMITS, log_level=0)
