"""The tokenizer of Qwen2: byte-level BPE over NFC text, numbers one digit at a time."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from quintet.errors import InputError, TokenizerError, shown
from quintet.files import MAX_LISTING_BYTES, read_json, read_text
from quintet.tokenization.base import PreTrainedTokenizer
from quintet.tokenization.files import existing, read_pipeline
from quintet.tokenization.guard import guarded
from quintet.tokenization.options import TokenizerOptions, check_names
from quintet.tokenization.partings import PARTINGS
from quintet.tokenization.vocabulary import check_gaps

_END = "<|endoftext|>"
PathLike = str | os.PathLike[str]


class Qwen2Tokenizer(PreTrainedTokenizer):
    """The tokenizer of Qwen2, Qwen2-MoE and their kin.

    Args:
        vocab_file: `vocab.json`, the tokens and their ids.
        merges_file: `merges.txt`, which pairs become one token, in order.
        errors: what decoding does with bytes that are not UTF-8, as in `bytes.decode`.
        unk_token: the token for what the vocabulary does not have; no text needs it.
        bos_token: none by default: texts begin without one.
        eos_token: the token a text ends with.
        pad_token: the token shorter rows are filled up with.
        clean_up_tokenization_spaces: not applicable, as no spaces are added.
        split_special_tokens: read special tokens written in a text as ordinary text.
        vocab: the content of `vocab_file`, in its place.
        merges: the content of `merges_file`, in its place.
        tokenizer_file: `tokenizer.json`, in place of both.
        options: as for `PreTrainedTokenizer`.

    Raises:
        InputError: the vocabulary is given twice, or in part.
        TokenizerError: a file is damaged.
    """

    _saved_as: ClassVar[str] = "Qwen2Tokenizer"

    def __init__(
        self,
        vocab_file: PathLike | None = None,
        merges_file: PathLike | None = None,
        errors: str = "replace",
        unk_token: str | AddedToken | None = _END,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = _END,
        pad_token: str | AddedToken | None = _END,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        *,
        vocab: Mapping[str, int] | None = None,
        merges: Sequence[str | tuple[str, str]] | None = None,
        tokenizer_file: PathLike | None = None,
        **options: Any,
    ) -> None:
        check_names(type(self).__name__, options, TokenizerOptions.__annotations__)
        given = [
            *([("tokenizer_file",)] if tokenizer_file is not None else []),
            *([("vocab_file", "merges_file")] if vocab_file or merges_file else []),
            *([("vocab", "merges")] if vocab is not None or merges is not None else []),
        ]
        if len(given) != 1:
            raise InputError(
                f"{type(self).__name__} needs its vocabulary once: vocab_file and merges_file, "
                "or vocab and merges, or tokenizer_file; for a directory use from_pretrained"
            )
        if tokenizer_file is not None:
            backend = read_pipeline(existing(tokenizer_file))
        elif given == [("vocab", "merges")]:
            backend = _pipeline(dict(vocab or {}), _pairs(merges or []))
        elif vocab_file is None or merges_file is None:
            raise InputError("vocab_file and merges_file belong together")
        else:
            backend = self._from_vocabulary(existing(vocab_file), existing(merges_file))
        merged: TokenizerOptions = {
            **options,  # type: ignore[typeddict-item]
            "errors": errors,
            "unk_token": unk_token,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
            "split_special_tokens": split_special_tokens,
        }
        self._set_up(backend, merged, {})

    @classmethod
    def _defaults(cls) -> TokenizerOptions:
        return {"unk_token": _END, "eos_token": _END, "pad_token": _END}

    @classmethod
    def _from_vocabulary(cls, vocab: Path, merges: Path) -> Tokenizer:
        with guarded(f"{vocab} or {merges} is damaged; fetch the files again"):
            tokens = read_json(vocab, MAX_LISTING_BYTES)
            lines = read_text(merges, MAX_LISTING_BYTES).split("\n")
        if lines and lines[0].startswith("#version"):
            del lines[0]
        return _pipeline(tokens, _pairs([line for line in lines if line.strip("\r")]))


class Qwen2TokenizerFast(Qwen2Tokenizer):
    """`Qwen2Tokenizer` with the arguments of its second name."""

    def __init__(
        self,
        vocab_file: PathLike | None = None,
        merges_file: PathLike | None = None,
        tokenizer_file: PathLike | None = None,
        unk_token: str | AddedToken | None = _END,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = _END,
        pad_token: str | AddedToken | None = _END,
        *,
        vocab: Mapping[str, int] | None = None,
        merges: Sequence[str | tuple[str, str]] | None = None,
        **options: Any,
    ) -> None:
        # The pipeline's file is the whole of it, where both are there.
        parts = (None, None) if tokenizer_file is not None else (vocab_file, merges_file)
        super().__init__(
            *parts,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            vocab=vocab,
            merges=merges,
            tokenizer_file=tokenizer_file,
            **options,
        )


def _pipeline(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    with guarded("the vocabulary and the merges do not go together"):
        check_gaps(vocab)
        backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    PARTINGS["qwen2"].apply(backend)
    return backend


def _pairs(merges: Sequence[str | tuple[str, str]]) -> list[tuple[str, str]]:
    pairs = []
    for line, merge in enumerate(merges, 1):
        pair = merge.rstrip("\r").split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise TokenizerError(f"merge {line} is {shown(merge)}; it has to be two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs
