"""A model in one file, wherever it was found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model in GGUF, and further facts from the program that keeps it.

    Attributes:
        path: of the file, or of the first of several.
        system: the message that conversations are to begin with.
        parameters: how answers are to be drawn, by the names that Ollama has for that.
    """

    path: Path
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
