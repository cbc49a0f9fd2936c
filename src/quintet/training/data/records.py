"""Files to records, one after the other: nothing is held but the record that is read."""

import codecs
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from quintet.errors import DataError, MissingDependencyError, shown
from quintet.training.data.files import SourceFile

# A text is read in pieces of so many bytes; a line of a file of records has no more than these.
PIECE = 1 << 17
LONGEST_LINE = 1 << 28

Undecodable: TypeAlias = Literal["bad", "replace"]
Pieces: TypeAlias = Iterator[str]


class Bad(Exception):  # noqa: N818
    """A sample that cannot be learned from; `reason` is short and groups similar ones."""

    def __init__(self, reason: str, details: str = "") -> None:
        self.reason, self.details = reason, details
        super().__init__(f"{reason}: {details}" if details else reason)


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a file.

    Attributes:
        line: the line or row, from 1; 0 where it is the whole file.
        value: a mapping of fields, the pieces of a text, or why there is none.
    """

    line: int
    value: "dict[str, Any] | Pieces | Bad"


def read(file: SourceFile, undecodable: Undecodable) -> Iterator[Record]:
    """Yield the records of a file, skipping bad ones.

    The pieces of a text have to be read before the next record is asked for, and raise `Bad`.

    Raises:
        DataError: the file cannot be read.
        MissingDependencyError: its format needs a package that is not installed.
    """
    try:
        if file.format in ("parquet", "arrow"):
            yield from _columns(file)
            return
        with _opened(file) as content:
            if file.format == "text":
                yield Record(0, _pieces(content, undecodable))
            else:
                yield from _lines(content, file, undecodable)
    except (OSError, EOFError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{file.path} cannot be read: {reason}") from error


def _opened(file: SourceFile) -> BinaryIO:
    if file.path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(file.path, "rb"))
    return file.path.open("rb")


def _pieces(content: BinaryIO, undecodable: Undecodable) -> Pieces:
    errors = "strict" if undecodable == "bad" else "replace"
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    line = 1
    while True:
        raw = content.read(PIECE)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += bytes(error.object[: error.start]).count(b"\n")
            raise Bad("not UTF-8", f"line {line}: {error.reason}") from error
        line += text.count("\n")
        if text:
            yield text
        if not raw:
            return


def _lines(content: BinaryIO, file: SourceFile, undecodable: Undecodable) -> Iterator[Record]:
    number = 0
    while raw := content.readline(LONGEST_LINE):
        number += 1
        if len(raw) == LONGEST_LINE:
            raise DataError(
                f"{file.path}:{number} is longer than {LONGEST_LINE:,} bytes; such a text has to "
                "be a file of its own, with format = 'text'"
            )
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw.strip():
            yield Record(number, _line(raw, file, undecodable))


def _line(raw: bytes, file: SourceFile, undecodable: Undecodable) -> dict[str, Any] | Pieces | Bad:
    try:
        text = raw.decode("utf-8", "strict" if undecodable == "bad" else "replace")
        text = text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"byte {error.start + 1}: {error.reason}")
    if file.format == "lines":
        return iter((text,))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return Bad("not JSON", f"character {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", str(error))
    if not isinstance(value, dict):
        return Bad("not a JSON object", shown(value))
    return value


def _columns(file: SourceFile) -> Iterator[Record]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError(
            f"{file.path} needs pyarrow; install it with pip install pyarrow"
        ) from error
    number = 0
    try:
        for batch in _tables(file, pyarrow):
            for row in batch.to_pylist():
                number += 1
                yield Record(number, _own(row))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file.path} is no {file.format} file that can be read, after {number} rows: {error}"
        ) from error


def _own(value: Any) -> Any:
    """Return a row's own fields: a column has the fields of all rows, empty in the others."""
    if isinstance(value, dict):
        return {name: _own(one) for name, one in value.items() if one is not None}
    return [_own(one) for one in value] if isinstance(value, list) else value


def _tables(file: SourceFile, pyarrow: Any) -> Iterator[Any]:
    """Yield tables of few rows."""
    if file.format == "parquet":
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            yield from parquet.iter_batches(batch_size=256)
        return
    with pyarrow.memory_map(str(file.path)) as mapped:
        try:
            whole = pyarrow.ipc.open_file(mapped)
            batches: Any = (whole.get_batch(i) for i in range(whole.num_record_batches))
        except pyarrow.ArrowInvalid:
            # What `datasets` keeps is a stream, which has no table of contents.
            mapped.seek(0)
            batches = iter(pyarrow.ipc.open_stream(mapped))
        for batch in batches:
            for start in range(0, batch.num_rows, 256):
                yield batch.slice(start, 256)
