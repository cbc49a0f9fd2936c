"""Workloads: lengths of prompts, shared prefixes, material."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quintet.errors import InputError

Prompt = list[int] | str
# Tokens of a conversation; more could not be written down here.
MOST = 1 << 24


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """A kind of conversation.

    Attributes:
        shared: how many tokens all prompts begin with.
        own: how many tokens more the first prompt of each has.
        out: how many tokens are made of a prompt.
        turns: how many prompts a conversation has, each the last one with its answer and more.
        grows: how many tokens a prompt is longer than the one before, its answer included.
        drops: the share of requests whose client goes before the end.

    Raises:
        InputError: a number that no conversation has.
    """

    shared: int
    own: int
    out: int
    turns: int = 1
    grows: int = 0
    drops: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("shared", self.shared, 0),
            ("own", self.own, 1),
            ("out", self.out, 1),
            ("turns", self.turns, 1),
            ("grows", self.grows, 1 if self.turns > 1 else 0),
        ):
            if value < least:
                raise InputError(f"{name}={value} has to be at least {least}")
        if not 0 <= self.drops <= 1:
            raise InputError(f"drops={self.drops} is a share of the requests, from 0 to 1")
        if self.most > MOST:
            raise InputError(
                f"a conversation of {self.most:,} tokens is beyond any model's context; "
                f"{MOST:,} are the most"
            )

    @property
    def most(self) -> int:
        """The maximum number of tokens of a prompt with its answer."""
        return self.shared + self.own + (self.turns - 1) * self.grows + self.out


SHAPES = {
    "chat": WorkloadShape(shared=256, own=256, out=64),
    "agent": WorkloadShape(shared=0, own=1500, out=96, turns=6, grows=500),
    "eval": WorkloadShape(shared=0, own=128, out=1),
    "prefix": WorkloadShape(shared=1024, own=64, out=32),
    "disconnects": WorkloadShape(shared=256, own=256, out=64, drops=0.3),
}


class Material(Protocol):
    """Units that prompts are made of, with their size in tokens."""

    def draw(self, tokens: int, dice: random.Random) -> Prompt:
        """Return a text of this many tokens, or as nearly as can be."""
        ...

    def join(self, parts: Sequence[Prompt]) -> Prompt:
        """Return parts in a row."""
        ...


@dataclass(frozen=True, slots=True)
class Ids:
    """Prompts of ids, drawn from some that the server itself made of a text: exactly as long."""

    alphabet: tuple[int, ...]

    def draw(self, tokens: int, dice: random.Random) -> Prompt:
        """Return this many ids."""
        return dice.choices(self.alphabet, k=tokens)

    def join(self, parts: Sequence[Prompt]) -> Prompt:
        """Return all ids in a row."""
        return [token for part in parts for token in part if isinstance(token, int)]


@dataclass(frozen=True, slots=True)
class Words:
    """Prompts of plain words, for servers that take no ids.

    Attributes:
        per_word: how many tokens a word is, in the mean.
    """

    per_word: float = 1.0

    def draw(self, tokens: int, dice: random.Random) -> Prompt:
        """Return words of about this many tokens."""
        return "".join(
            f" {word}" for word in dice.choices(WORDS, k=max(1, round(tokens / self.per_word)))
        )

    def join(self, parts: Sequence[Prompt]) -> Prompt:
        """Return one text."""
        return "".join(part for part in parts if isinstance(part, str))


# Each is one token with most tokenizers, with the space before it.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who "
    "will no more if out so up said what its about than into them can only other time new some "
    "could these two may first then do any like my now over such our man me even most made after "
    "also did many off before must well back through years where much your way down should "
    "because long each just state people those too world very make good high water road house "
    "light night river stone paper green small great under again never still place hand part"
)
WORDS = tuple(_TEXT.split())
