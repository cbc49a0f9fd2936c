"""The other side of a conversation: a local model, or a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quintet.cli.conversation import Message

if TYPE_CHECKING:
    from quintet.cli.answer import AnswerPrinter


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an answer that was not interrupted.

    Attributes:
        ended: that it was cut, and what to do about it; None if it ended by itself.
        drafted: what drafts gave, as words behind the figures.
        warning: what of the settings has no effect; None for nothing that is news.
    """

    ended: str | None = None
    drafted: str = ""
    warning: str | None = None


class Partner(Protocol):
    """Answers messages."""

    @property
    def name(self) -> str:
        """The model's."""
        ...

    @property
    def context(self) -> int | None:
        """The maximum number of tokens of prompt and answer; None if it is unknown."""
        ...

    def describe(self) -> str:
        """Describe the model and its settings in a line."""
        ...

    def answer(self, messages: Sequence[Message], answer: "AnswerPrinter") -> Outcome:
        """Answer messages, and pass the answer's events on.

        Raises:
            KeyboardInterrupt: it was interrupted; the answer has what there is.
        """
        ...

    def set(self, given: dict[str, Any]) -> str:
        """Set options, and describe the options in force; None for the defaults.

        Raises:
            InputError: there is no such option, or its value breaks a rule.
        """
        ...

    def take(self, model: str) -> str:
        """Have another model answer, and say in a line which; "" lists those there are.

        Raises:
            InputError: there is no such model.
        """
        ...
