"""What a chat template made of a conversation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a conversation, and which parts of it `{% generation %}` encloses."""

    text: str
    generated: tuple[tuple[int, int], ...]
