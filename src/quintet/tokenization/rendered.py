"""A rendered conversation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation, and the spans of `{% generation %}`."""

    text: str
    generated: tuple[tuple[int, int], ...]
