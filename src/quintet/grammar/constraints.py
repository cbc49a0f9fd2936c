"""Constraints of a text, independent of the tokenizer."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quintet.errors import GrammarError, shown
from quintet.grammar.bounds import bounded_schema, check_lark
from quintet.grammar.faults import JSON_STYLE, clear_reason, schema_fault
from quintet.grammar.vocabulary import GrammarVocabulary

# How many bytes may say what a text may be.
MAX_SOURCE = 65_536


class Constraint(ABC):
    """A constraint of a text, comparable by value."""

    @abstractmethod
    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        """Return llguidance grammars, the first being the whole text."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Its name in messages."""

    def fault(self, reason: str) -> str:
        """Explain llguidance's error in one line."""
        return clear_reason(reason)


@dataclass(frozen=True, slots=True)
class _Schema(Constraint):
    """JSON that matches a schema."""

    schema: str

    @property
    def kind(self) -> str:
        return "JSON schema"

    def fault(self, reason: str) -> str:
        return schema_fault(self.schema) or clear_reason(reason)

    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        return [{"json_schema": json.loads(self.schema) | {"x-guidance": JSON_STYLE}}]


@dataclass(frozen=True, slots=True)
class _Regex(Constraint):
    """Text that matches an expression."""

    pattern: str

    @property
    def kind(self) -> str:
        return "regular expression"

    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        return [{"lark_grammar": f"start: {expression(self.pattern)}"}]


@dataclass(frozen=True, slots=True)
class _Lark(Constraint):
    """Text of a Lark grammar."""

    text: str

    @property
    def kind(self) -> str:
        return "grammar"

    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        return [{"lark_grammar": self.text}]


@dataclass(frozen=True, slots=True)
class _Choice(Constraint):
    """One of several texts."""

    texts: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "choice"

    def grammar(self, vocabulary: GrammarVocabulary) -> list[dict[str, Any]]:
        # As one terminal they are read like an expression, however many they are.
        return [{"lark_grammar": "start: ANY\nANY: " + " | ".join(map(literal, self.texts))}]


def json_object() -> Constraint:
    """Return the constraint of a JSON object."""
    return _Schema('{"type": "object"}')


def json_schema(schema: Mapping[str, Any] | str) -> Constraint:
    """Return the constraint of JSON that matches a schema.

    Properties come in the order in which the schema has them.

    Args:
        schema: a JSON schema, or its text, of at most 64 KiB.

    Raises:
        GrammarError: it is none, asks for what is not supported, or contradicts itself; the message
            has the keyword and its place.
    """
    return _Schema(bounded_schema(schema, MAX_SOURCE))


def regex(pattern: str) -> Constraint:
    """Return the constraint of text that matches an expression.

    Its language is that of Rust's `regex`: no look-around and no references to groups.

    Raises:
        GrammarError: it is no text, or longer than 64 KiB.
    """
    return _Regex(_source("regex", pattern))


def lark(text: str) -> Constraint:
    """Return the constraint of a grammar in llguidance's variant of Lark.

    Raises:
        GrammarError: it is no text, longer than 64 KiB, or takes too long to be read.
    """
    check_lark(_source("grammar", text))
    return _Lark(text)


def choice(texts: Sequence[str]) -> Constraint:
    """Return the constraint of one of several texts.

    Raises:
        GrammarError: there is none, one is no text, or they are longer than 64 KiB together.
    """
    if isinstance(texts, str) or not texts or not all(isinstance(one, str) for one in texts):
        raise GrammarError(f"choice={shown(texts)} has to be a list of texts, at least one")
    _source("choice", "\n".join(texts))
    return _Choice(tuple(dict.fromkeys(texts)))


def literal(text: str) -> str:
    """Quote a text for a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def expression(pattern: str) -> str:
    """Quote an expression for a Lark grammar."""
    escaped, text = False, []
    for letter in pattern:
        if letter == "/" and not escaped:
            text.append("\\")
        text.append({"\n": "n" if escaped else "\\n"}.get(letter, letter))
        escaped = letter == "\\" and not escaped
    return f"/{''.join(text)}/"


def _source(name: str, text: object) -> str:
    """Check the text of an expression or grammar.

    Raises:
        GrammarError: it is none, or too long.
    """
    if not isinstance(text, str):
        raise GrammarError(f"{name}={shown(text)} has to be a text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{name}={shown(text)} holds half of a character") from None
    if size > MAX_SOURCE:
        raise GrammarError(
            f"{name} has {size:,} bytes, and at most {MAX_SOURCE:,} are read; shorten it"
        )
    return text
