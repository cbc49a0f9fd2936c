"""The tokenizer in a GGUF file's metadata.

Of a released tokenizer such a file keeps the vocabulary, the merges, the name of the parting and a
kind for each token. Added tokens lose their flags: the converter calls all that looks like <|…|> a
control token, so more tokens are special than in the release.
"""

import warnings
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from quintet.errors import TokenizerError, UnsupportedModelError, shown
from quintet.gguf.cursor import Value
from quintet.tokenization.files import TokenizerFiles
from quintet.tokenization.guard import guarded
from quintet.tokenization.options import NAMED_TOKENS, is_text
from quintet.tokenization.partings import PARTINGS, Parting
from quintet.tokenization.sentencepiece import BPE as OF_SENTENCEPIECE
from quintet.tokenization.sentencepiece import MAX_PIECE, Model, ModelPiece, pipeline_of

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# The file's word for each role.
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
# What ends an answer, by the text of a control token; a file has room for one or two ids.
ENDS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>"),
    *("<|EOT|>", "<EOT>", "<｜end▁of▁sentence｜>", "<end_of_turn>"),
)
# For files that name no parting: of these numbers of tokens there is one tokenizer.
_BY_SIZE = {
    "deepseek2": {102400: "deepseek-llm", 129280: "deepseek-v3"},
    "llama": {
        **{32022: "deepseek-coder", 32256: "deepseek-coder", 102400: "deepseek-llm"},
        **{49152: "smollm", 128256: "llama-bpe"},
    },
}
_UNNAMED = (None, "", "default")


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A file's tokens and their kinds, by id."""

    texts: list[str]
    kinds: list[int]

    def of_kind(self, *kinds: int) -> dict[str, int]:
        """Return the tokens of some kinds, and their ids."""
        pairs = zip(self.texts, self.kinds, strict=True)
        return {text: index for index, (text, kind) in enumerate(pairs) if kind in kinds}


def has_tokenizer(metadata: Mapping[str, Value]) -> bool:
    """Return whether a file contains a tokenizer."""
    return metadata.get(f"{KEY}model") not in (None, "none", "no_vocab")


def read_gguf_tokenizer(metadata: Mapping[str, Value], path: Path) -> TokenizerFiles:
    """Build the tokenizer from a file's metadata.

    Raises:
        TokenizerError: tokens, kinds, merges and ids contradict each other, or are damaged.
        UnsupportedModelError: a tokenizer of another kind, or a parting that is not known.
    """
    with guarded(f"{path} makes no tokenizer"):
        if not has_tokenizer(metadata):
            raise TokenizerError(
                f"{path} has no tokenizer; use the one of the release, as "
                "AutoTokenizer.from_pretrained('owner/name')"
            )
        tokens = _read_tokens(metadata, path)
        kind = metadata[f"{KEY}model"]
        if kind == "gpt2":
            pipeline, settings = _byte_level(metadata, tokens, path)
        elif kind == "llama":
            pipeline, settings = _sentencepiece(metadata, tokens, path)
        else:
            raise UnsupportedModelError(
                f"{path}: {KEY}model={shown(kind)} is not supported; there are gpt2 (byte-level "
                "BPE) and llama (SentencePiece)"
            )
        _check_ids(pipeline, tokens, path)
        settings |= {role: _role(metadata, role, tokens, path) for role in NAMED_TOKENS}
        length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        if type(length) is int and length > 0:
            settings["model_max_length"] = length
    template = _templates(metadata, path)
    return TokenizerFiles(root=path, settings=settings, chat_template=template, backend=pipeline)


def end_ids(metadata: Mapping[str, Value], path: Path) -> list[int]:
    """Return the ids of end tokens, `eos_token`'s first.

    These are the ones that the file calls end of text, turn or message, and control tokens that
    have the text of one.
    """
    tokens = _read_tokens(metadata, path)
    control = tokens.of_kind(CONTROL)
    named = [_id(metadata, f"{KEY}{name}_token_id", tokens, path) for name in ("eos", "eot", "eom")]
    by_text = [control.get(text) for text in ENDS]
    return list(dict.fromkeys(index for index in (*named, *by_text) if index is not None))


def token_id(metadata: Mapping[str, Value], text: str, path: Path) -> int | None:
    """Return the id of a control or user-defined token, or None."""
    return _read_tokens(metadata, path).of_kind(CONTROL, USER_DEFINED).get(text)


def _read_tokens(metadata: Mapping[str, Value], path: Path) -> _Tokens:
    texts = metadata.get(f"{KEY}tokens")
    if not isinstance(texts, list) or not texts or not all(map(is_text, texts)):
        raise TokenizerError(f"{path}: {KEY}tokens has to be a list of texts")
    given = metadata.get(f"{KEY}token_type")
    kinds = [NORMAL] * len(texts) if given is None else _numbers(given)
    if kinds is None or len(kinds) != len(texts):
        count = "no list of numbers" if kinds is None else f"{len(kinds)} numbers"
        raise TokenizerError(
            f"{path}: {KEY}token_type is {count}, and there are {len(texts)} tokens"
        )
    if wrong := [kind for kind in kinds if not NORMAL <= kind <= BYTE]:
        raise TokenizerError(f"{path}: {KEY}token_type has {shown(wrong[0])}; there are 1 to 6")
    return _Tokens(texts, kinds)


def _numbers(value: Value) -> list[int] | None:
    if not isinstance(value, array) or value.typecode in "fd":
        return None
    return [int(number) for number in value]


def _byte_level(
    metadata: Mapping[str, Value], tokens: _Tokens, path: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    name = _parting_name(metadata, len(tokens.texts), path)
    parting = PARTINGS[name]
    merges = metadata.get(f"{KEY}merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: {KEY}merges has to be a list of pairs")
    # A space in the alphabet of bytes is another letter, so the first one parts the pair.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    usual = tokens.of_kind(NORMAL, BYTE, UNKNOWN)
    added = tokens.of_kind(CONTROL, USER_DEFINED)
    if len(usual | added) < sum(kind != UNUSED for kind in tokens.kinds):
        raise TokenizerError(f"{path}: {KEY}tokens has a token twice")
    usual |= _inside(usual, added)
    pipeline = Tokenizer(BPE(vocab=usual, merges=pairs, ignore_merges=parting.whole))
    parting.apply(pipeline)
    _add(pipeline, tokens, added)
    settings: dict[str, Any] = {
        "add_bos_token": _switch(metadata, "add_bos_token", parting.whole, path),
        "add_eos_token": _switch(metadata, "add_eos_token", False, path),
        "tokenizer_class": _class_of(parting),
    }
    return pipeline, settings


def _inside(usual: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    """Return the added tokens that must be in the vocabulary to keep their ids.

    The others are counted on from there.
    """
    last = max(usual.values(), default=-1)
    inside = {text: index for text, index in added.items() if index <= last}
    appended = sorted(index for index in added.values() if index > last)
    counted = range(last + 1, last + 1 + len(appended))
    gapless = len(usual) + len(inside) == last + 1 and appended == [*counted]
    return inside if gapless else dict(added)


def _class_of(parting: Parting) -> str:
    return "Qwen2Tokenizer" if parting.nfc else "PreTrainedTokenizerFast"


def _parting_name(metadata: Mapping[str, Value], size: int, path: Path) -> str:
    name = metadata.get(f"{KEY}pre")
    if isinstance(name, str) and name in PARTINGS:
        return name
    release = "take the release's tokenizer: AutoTokenizer.from_pretrained('owner/name')"
    if name not in _UNNAMED:
        raise UnsupportedModelError(
            f"{path}: {KEY}pre={shown(name)} is not known, and so not how it parts texts; there "
            f"are {', '.join(PARTINGS)}; {release}"
        )
    architecture = metadata.get("general.architecture")
    found = None
    if isinstance(architecture, str):
        found = _BY_SIZE.get(architecture, {}).get(size)
        found = "qwen2" if architecture in ("qwen2", "qwen2moe") else found
    if found is None:
        raise UnsupportedModelError(
            f"{path} does not say how texts are parted ({KEY}pre), and of {shown(architecture)} "
            f"with {size} tokens no tokenizer is known; {release}"
        )
    warnings.warn(
        f"{path} is an old file that does not say how texts are parted ({KEY}pre); taken is "
        f"{found!r}, by its architecture and its {size} tokens",
        stacklevel=2,
    )
    return found


def _sentencepiece(
    metadata: Mapping[str, Value], tokens: _Tokens, path: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    scores = metadata.get(f"{KEY}scores")
    if not isinstance(scores, array) or len(scores) != len(tokens.texts):
        raise TokenizerError(f"{path}: {KEY}scores has to be a number for each token")
    long = any(len(text.encode()) > MAX_PIECE for text in tokens.texts)
    if long or "" in tokens.texts or len(set(tokens.texts)) < len(tokens.texts):
        raise TokenizerError(
            f"{path}: {KEY}tokens has a token twice, an empty one, or one of more than "
            f"{MAX_PIECE} bytes"
        )
    pieces = [
        ModelPiece(text, float(score), kind)
        for text, score, kind in zip(tokens.texts, scores, tokens.kinds, strict=True)
    ]
    unknown = _id(metadata, f"{KEY}unknown_token_id", tokens, path)
    model = Model(
        pieces,
        kind=OF_SENTENCEPIECE,
        unknown=0 if unknown is None else unknown,
        charsmap=b"",
        prefix=_switch(metadata, "add_space_prefix", True, path),
        squeezes=_switch(metadata, "remove_extra_whitespaces", False, path),
    )
    settings: dict[str, Any] = {
        "add_bos_token": _switch(metadata, "add_bos_token", True, path),
        "add_eos_token": _switch(metadata, "add_eos_token", False, path),
    }
    # Releases of this kind, and llama.cpp, read on behind a token as behind a space.
    return pipeline_of(model, model.prefix, every=True), settings


def _add(pipeline: Tokenizer, tokens: _Tokens, added: Mapping[str, int]) -> None:
    """Add tokens in the order of their ids."""
    control = tokens.of_kind(CONTROL)
    pipeline.add_tokens(
        [
            AddedToken(text, normalized=False, special=text in control)
            for text, _ in sorted(added.items(), key=lambda entry: entry[1])
        ]
    )


def _check_ids(pipeline: Tokenizer, tokens: _Tokens, path: Path) -> None:
    """Check that added tokens got the file's ids."""
    for text, index in tokens.of_kind(CONTROL, USER_DEFINED).items():
        if (found := pipeline.token_to_id(text)) != index:
            raise TokenizerError(
                f"{path}: the token {shown(text)} has the id {index} in the file, and comes out as "
                f"{found}"
            )


def _role(metadata: Mapping[str, Value], role: str, tokens: _Tokens, path: Path) -> str | None:
    index = _id(metadata, f"{KEY}{ROLES[role]}_token_id", tokens, path)
    if index is None or tokens.kinds[index] == UNUSED:
        return None
    return tokens.texts[index]


def _id(metadata: Mapping[str, Value], key: str, tokens: _Tokens, path: Path) -> int | None:
    index = metadata.get(key)
    if index is None or index == 2**32 - 1 or index == -1:
        return None
    if type(index) is not int or not 0 <= index < len(tokens.texts):
        raise TokenizerError(
            f"{path}: {key}={shown(index)} is no id of one of its {len(tokens.texts)} tokens"
        )
    return index


def _switch(metadata: Mapping[str, Value], name: str, usual: bool, path: Path) -> bool:
    value = metadata.get(f"{KEY}{name}", usual)
    if not isinstance(value, bool):
        raise TokenizerError(f"{path}: {KEY}{name}={shown(value)} has to be true or false")
    return value


def _templates(metadata: Mapping[str, Value], path: Path) -> str | dict[str, str] | None:
    """Return the chat template, or several by name."""
    named = {
        key.removeprefix(TEMPLATE).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    texts: dict[str, str] = {}
    for name, value in named.items():
        if not isinstance(value, str) or not is_text(value):
            raise TokenizerError(f"{path}: the chat template {shown(name)} has to be a text")
        texts[name] = value
    if not texts:
        return None
    return texts["default"] if list(texts) == ["default"] else texts
