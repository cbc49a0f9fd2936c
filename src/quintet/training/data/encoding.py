"""Files to a store of encoded documents: once, and from then on it is only opened."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from quintet.errors import ConfigError, DataError
from quintet.modeling.progress import progress_bar
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.data.files import SourceFile, digest_of, files_of
from quintet.training.data.records import Bad, Pieces, Record, read
from quintet.training.data.samples import Samples, hash_of, kind_of, text_of
from quintet.training.data.settings import DataSettings, Kind, SourceSettings
from quintet.training.data.store import VERSION, Store, StoreWriter
from quintet.training.data.text import TextEncoder

# Short texts are encoded together, about so many characters at once.
TOGETHER = 1 << 18

Maker = Callable[[SourceSettings, Kind], Samples]


@dataclass(frozen=True, slots=True)
class _Source:
    settings: SourceSettings
    files: list[SourceFile]
    kind: Kind


def store_of(
    sources: Sequence[SourceSettings],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizer,
    made_of: Maker,
    folder: Path,
    tell: Callable[[str], None],
) -> Store:
    """Return the documents of sources as ids, encoding them where that was not done before.

    Args:
        sources: which files.
        settings: how they are read.
        tokenizer: whose ids.
        made_of: what makes samples of records that are no plain text, by their kind.
        folder: where stores are kept.
        tell: called with how many documents were encoded, and where they are.

    Raises:
        ModelNotFoundError: a path names no file.
        ConfigError: it is not clear what the files hold.
        DataError: a file cannot be read, or a sample is bad and bad ones are not left out.
        SaveError: the folder cannot be written.
    """
    found = [_source(source, folder) for source in sources]
    kinds = {source.kind for source in found}
    if "pairs" in kinds and len(kinds) > 1:
        raise ConfigError(
            f"data: pairs and {' and '.join(sorted(kinds - {'pairs'}))} are not learned from in "
            "one step; train on one after the other"
        )
    kind = "+".join(sorted(kinds))
    place = folder / _key(found, settings, tokenizer)[:32]
    store = Store.open(place)
    if store is None:
        text = TextEncoder(tokenizer, settings.end, control_tokens=settings.control_tokens)
        masked = kinds != {"text"}
        with StoreWriter(place, len(tokenizer), masked=masked) as writer:
            encoding = _Encoding(writer, text, stop=settings.on_bad == "stop")
            encoding.run(found, made_of)
            around = len(text.begin), len(text.end)
            store = writer.finish(encoding.names, encoding.left_out, kind, around)
        tell(f"data: {len(store):,} documents were encoded, and are kept in {folder}")
    elif store.left_out and settings.on_bad == "stop":
        reason, (_, first) = next(iter(store.left_out.items()))
        raise _refused(first, reason)
    if not len(store):
        reasons = "; ".join(f"{reason}: {n}" for reason, (n, _) in store.left_out.items())
        raise DataError(
            f"data: no sample is left to learn from ({reasons or 'the files are empty'})"
        )
    return store


def _source(settings: SourceSettings, folder: Path) -> _Source:
    files = files_of(settings, folder)
    kind = settings.kind
    plain = all(file.format in ("text", "lines") for file in files)
    if kind is None:
        kind = "text" if plain else _kind(files, settings)
    if kind != "text" and plain:
        raise ConfigError(
            f"data: files of text hold no {kind}; that takes records: format = 'jsonl', 'parquet' "
            "or 'arrow'"
        )
    return _Source(settings, files, kind)


def _kind(files: Sequence[SourceFile], settings: SourceSettings) -> Kind:
    """Return the kind of the first good record."""
    for file in files:
        for record in read(file, settings.undecodable):
            if isinstance(record.value, dict):
                return kind_of(record.value, settings.fields)
            if not isinstance(record.value, Bad):
                return "text"
    return "text"


def _key(sources: Sequence[_Source], settings: DataSettings, tokenizer: PreTrainedTokenizer) -> str:
    """Return the key of a store: a digest of files, tokenizer and way of reading."""
    read_by = [
        (source.kind, asdict(source.settings.fields), source.settings.undecodable)
        for source in sources
    ]
    how = (settings.end, settings.control_tokens, settings.train_on, dict(settings.template))
    files = [digest_of(source.files) for source in sources]
    text = json.dumps([VERSION, files, read_by, how, tokenizer.to_files()])
    return hashlib.sha256(text.encode()).hexdigest()


def _refused(place: str, reason: str) -> DataError:
    return DataError(
        f"{place}: {reason}; repair it, or set data.on_bad = 'skip' to leave such samples out"
    )


@dataclass
class _Encoding:
    """Reads files and writes their samples."""

    writer: StoreWriter
    text: TextEncoder
    stop: bool
    names: list[str] = field(default_factory=list)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    _texts: list[tuple[str, bytes, int, int]] = field(default_factory=list)
    _characters: int = 0

    def run(self, sources: Sequence[_Source], made_of: Maker) -> None:
        """Write everything."""
        whole = sum(file.path.stat().st_size for source in sources for file in source.files)
        with progress_bar("encoding", whole) as bar:
            for source in sources:
                samples = None if source.kind == "text" else made_of(source.settings, source.kind)
                for file in source.files:
                    self.names.append(str(file.path))
                    for record in read(file, source.settings.undecodable):
                        try:
                            self._record(record, samples, source.settings.fields.text)
                        except Bad as bad:
                            self._leave_out(bad, len(self.names) - 1, record.line)
                    bar.update(file.path.stat().st_size)
        self._flush()

    def _record(self, record: Record, samples: Samples | None, name: str) -> None:
        value, file = record.value, len(self.names) - 1
        if isinstance(value, Bad):
            raise value
        if samples is not None:
            assert isinstance(value, dict)
            sample = samples.sample(value)
            for document in sample.documents:
                self.writer.extend(document.ids, document.learned)
                self.writer.close(
                    size=sample.size, text_hash=sample.hash, file=file, line=record.line
                )
        else:
            pieces = iter((text_of(value, name),)) if isinstance(value, dict) else value
            self._document(pieces, file, record.line)

    def _document(self, pieces: Pieces, file: int, line: int) -> None:
        first, second = next(pieces, ""), next(pieces, None)
        if second is not None:
            self._flush()
            self._long(chain((first, second), pieces), file, line)
            return
        if not first.strip():
            raise Bad("empty", "there is no text in it")
        self._texts.append((first, hash_of(first), file, line))
        self._characters += len(first)
        if self._characters > TOGETHER:
            self._flush()

    def _long(self, pieces: Pieces, file: int, line: int) -> None:
        """Write a text that is never in memory as a whole."""
        digest, size = hashlib.sha256(), 0

        def counted() -> Iterator[str]:
            nonlocal size
            for piece in pieces:
                raw = piece.encode()
                digest.update(raw)
                size += len(raw)
                yield piece

        try:
            self.writer.extend(self.text.begin)
            for ids in self.text.stream(counted()):
                self.writer.extend(ids)
        except Bad:
            self.writer.forget()
            raise
        self.writer.extend(self.text.end)
        self.writer.close(size=size, text_hash=digest.digest(), file=file, line=line)

    def _flush(self) -> None:
        """Encode and write the texts that wait."""
        waiting, self._texts, self._characters = self._texts, [], 0
        ids_of_all = self.text.encode([text for text, *_ in waiting]) if waiting else []
        for (text, digest, file, line), own in zip(waiting, ids_of_all, strict=True):
            ids = [*self.text.begin, *own, *self.text.end]
            if len(ids) < 2:
                self._leave_out(Bad("one token", "nothing can be predicted"), file, line)
                continue
            self.writer.extend(ids)
            size = len(text.encode())
            self.writer.close(size=size, text_hash=digest, file=file, line=line)

    def _leave_out(self, bad: Bad, file: int, line: int) -> None:
        place = f"{self.names[file]}:{line}" if line else self.names[file]
        if self.stop:
            raise _refused(place, str(bad)) from bad
        n, first = self.left_out.get(bad.reason, (0, place))
        self.left_out[bad.reason] = (n + 1, first)
