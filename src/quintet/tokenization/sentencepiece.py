"""Converts SentencePiece's `tokenizer.model` to a pipeline of `tokenizers`.

Such a file is a message in the wire format of protocol buffers. Of its pieces, type and score say
what they are: a BPE model merges the pair first whose piece has the best score.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quintet.errors import CheckpointError, TokenizerError
from quintet.files import MAX_LISTING_BYTES, read_limited
from quintet.tokenization.files import TokenizerFiles
from quintet.tokenization.guard import guarded
from quintet.tokenization.options import TokenizerOptions

# A vocabulary of a million pieces is about 30 MB.
# A merge is looked for at every place of a piece.
MAX_PIECE = 4096
SPACE = "▁"
# Kinds of pieces, and of models.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
UNIGRAM, BPE = 1, 2

Value = int | bytes


@dataclass(frozen=True, slots=True)
class ModelPiece:
    """A vocabulary entry; its kind is a number of the format."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class Model:
    """The content of a file: pieces by id, and the normalisation."""

    pieces: list[ModelPiece]
    kind: int
    unknown: int
    charsmap: bytes
    prefix: bool
    squeezes: bool


def read_sentencepiece(path: Path, *, add_prefix_space: bool | None = None) -> Tokenizer:
    """Read a BPE or unigram `tokenizer.model`.

    Control pieces and what users defined become added tokens. `add_prefix_space` is in place of
    what the file says.

    Raises:
        TokenizerError: the file is damaged, or a model of words or characters.
    """
    try:
        model = _parse(read_limited(path, MAX_LISTING_BYTES))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error
    except (ValueError, OSError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not a SentencePiece model ({error})") from error
    if model.kind not in (UNIGRAM, BPE):
        raise TokenizerError(f"{path} is a SentencePiece model of words or characters, not of BPE")
    prefix = model.prefix if add_prefix_space is None else add_prefix_space
    with guarded(f"{path} is not a usable SentencePiece model"):
        return pipeline_of(model, prefix)


def read_with_settings(
    files: TokenizerFiles, options: TokenizerOptions
) -> tuple[Tokenizer, TokenizerOptions]:
    """Read `tokenizer.model`, with Llama's defaults for special tokens.

    Files of this kind are of Llama's descent, whose texts begin with <s> unless the settings have
    it otherwise.
    """
    assert files.sentencepiece is not None
    given = options.get("add_prefix_space")
    prefix = files.settings.get("add_prefix_space") if given is None else given
    backend = read_sentencepiece(files.sentencepiece, add_prefix_space=prefix)
    if given is not None:
        files.settings["add_prefix_space"] = given
    options = {**options, "add_prefix_space": None}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for role, text in usual.items():
        if role not in files.settings and backend.token_to_id(text) is not None:
            files.settings[role] = text
    begins = files.settings.get("add_bos_token", files.settings.get("bos_token") is not None)
    ends = files.settings.get("add_eos_token", False)
    return backend, {"add_bos_token": bool(begins), "add_eos_token": bool(ends), **options}


def pipeline_of(model: Model, prefix: bool, *, every: bool = False) -> Tokenizer:
    """Build a model's pipeline; `prefix` puts a space before a text.

    With `every`, so does what follows an added token.
    """
    pipeline = Tokenizer(_vocabulary(model))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeezes:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        # Metaspace puts no space before one that is there; SentencePiece does.
        steps.append(normalizers.Replace(Regex(r"\A "), "  "))
    if steps:
        pipeline.normalizer = normalizers.Sequence(steps)
    # What is first, Metaspace tells by its place, which stripping moves.
    scheme = "never" if not prefix else "always" if every or model.squeezes else "first"
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme=scheme, split=False
    )
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1, right=0)] if prefix else []),
        ]
    )
    for piece in model.pieces:
        if piece.kind in (CONTROL, USER_DEFINED):
            token = AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            pipeline.add_tokens([token])
    return pipeline


def _vocabulary(model: Model) -> models.Model:
    bytewise = any(piece.kind == BYTE for piece in model.pieces)
    if model.kind == UNIGRAM:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        return models.Unigram(scores, model.unknown, bytewise)
    return models.BPE(
        vocab={piece.text: index for index, piece in enumerate(model.pieces)},
        merges=_merges(model.pieces),
        unk_token=model.pieces[model.unknown].text,
        fuse_unk=True,
        byte_fallback=bytewise,
    )


def _merges(pieces: list[ModelPiece]) -> list[tuple[str, str]]:
    """Return the merges of all pieces, best first."""
    texts = {piece.text for piece in pieces}
    usual = [piece for piece in pieces if piece.kind not in (CONTROL, USER_DEFINED, BYTE)]
    # Sorting keeps the order of pieces with the same score.
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in sorted(usual, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in texts and piece.text[cut:] in texts
    ]


def _parse(raw: bytes) -> Model:
    pieces: list[ModelPiece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for field, value in _fields(raw):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(dict(_fields(value))))
        elif field == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    unknown = trainer.get(40, 0)
    if not pieces or not isinstance(unknown, int) or unknown >= len(pieces):
        raise ValueError("it has no pieces, or no piece for what is unknown")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("a piece is there twice")
    charsmap = normalizer.get(2, b"")
    return Model(
        pieces,
        kind=int(trainer.get(3, UNIGRAM)),
        unknown=unknown,
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        prefix=bool(normalizer.get(3, 1)),
        squeezes=bool(normalizer.get(4, 1)),
    )


def _piece(fields: dict[int, Value]) -> ModelPiece:
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece has no text and score")
    if not isinstance(kind, int) or not text or len(text) > MAX_PIECE:
        raise ValueError(f"a piece has no text, or more than {MAX_PIECE} bytes of it")
    return ModelPiece(text.decode(), struct.unpack("<f", score)[0], kind)


def _fields(raw: bytes) -> Iterator[tuple[int, Value]]:
    """Yield the fields of a protobuf message."""
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        kind = tag & 7
        if kind == 0:
            value: Value
            value, position = _varint(raw, position)
        else:
            size = 4 if kind == 5 else 8
            if kind == 2:
                size, position = _varint(raw, position)
            elif kind not in (1, 5):
                raise ValueError(f"field {tag >> 3} is of the unknown kind {kind}")
            if position + size > len(raw):
                raise ValueError(f"field {tag >> 3} ends behind the end of the file")
            value, position = raw[position : position + size], position + size
        yield tag >> 3, value


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise ValueError("it ends within a number")
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number is too long")
