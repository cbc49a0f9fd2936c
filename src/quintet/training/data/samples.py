"""Records to samples: which of their ids are learned, or why nothing can be."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from quintet.errors import ConfigError, shown
from quintet.training.data.records import Bad
from quintet.training.data.settings import FieldNames, Kind


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of a document, and 1 for each that is learned; None if all are."""

    ids: list[int]
    learned: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """The documents of a record; of a pair, the preferred one first.

    Attributes:
        documents: as they are learned.
        size: the bytes of its text; 0 where only parts are learned.
        hash: of what it says.
    """

    documents: tuple[Encoded, ...]
    size: int
    hash: bytes


class Samples(Protocol):
    """Makes samples of the records of one kind."""

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Encode a record as a sample.

        Raises:
            Bad: nothing can be learned from it.
        """
        ...


def kind_of(record: Mapping[str, Any], fields: FieldNames) -> Kind:
    """Return the kind of a record, by its fields.

    Raises:
        ConfigError: none of the kinds.
    """
    needs: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("chat", (fields.messages,)),
        ("pairs", (fields.chosen, fields.rejected)),
        ("completion", (fields.prompt, fields.completion)),
        ("text", (fields.text,)),
    )
    for kind, names in needs:
        if all(name in record for name in names):
            return kind
    wanted = "; ".join(f"{kind} has {' and '.join(names)}" for kind, names in needs)
    raise ConfigError(
        f"data: a record has the fields {shown(list(record))}, which is no kind of sample: "
        f"{wanted}. Say how the fields are called, as in fields = {{ text = 'content' }}"
    )


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record.

    Raises:
        Bad: it has none of that name.
    """
    if name not in record:
        raise Bad(f"no field {shown(name)}", f"there are {shown(list(record))}")
    return record[name]


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return a field that has to be text.

    Raises:
        Bad: it is not there, or is none, or nothing but space.
    """
    text = field_of(record, name)
    if not isinstance(text, str):
        raise Bad(f"the field {shown(name)} is no text", shown(text))
    if not text.strip():
        raise Bad("empty", f"the field {shown(name)} is {shown(text)}")
    return text


def hash_of(content: object) -> bytes:
    """Return the hash of a text, or of a value that JSON can hold.

    Raises:
        Bad: it holds half of a surrogate pair.
    """
    try:
        text = (
            content
            if isinstance(content, str)
            else json.dumps(content, ensure_ascii=False, default=str)
        )
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise Bad("not Unicode", f"half of a surrogate pair at character {error.start}") from error
