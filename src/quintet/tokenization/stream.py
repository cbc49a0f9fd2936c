"""Incremental decoding: final text at once, the rest at the end."""

import codecs
from collections.abc import Sequence
from typing import Any

from quintet.errors import TokenizerError
from quintet.tokenization.arrays import as_ids
from quintet.tokenization.bytelevel import token_bytes
from quintet.tokenization.decoding import Decoder, clean_up, decoder_steps

# Steps whose text for a token depends on the tokens before it only by whether there are any.
_LOCAL_STEPS = {"Replace", "Metaspace", "WordPiece"}
# Letters that the clean-up of spaces looks at: text is certain up to any other letter.
_CLEANED = frozenset(" .?!,'ntmsver")
_ANCHOR = "a"


class IncrementalDecoder:
    """Decodes a growing list of ids.

    What `push` and `flush` return, joined, is `tokenizer.decode` of all the ids. `push` never
    returns half of a character, nor anything later ids could change. A pipeline whose text can
    change at a distance gives all of it at `flush`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> None:
        if not isinstance(tokenizer, Decoder):
            tokenizer = _of_another_library(tokenizer)
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._silent = tokenizer._silent_ids() if skip_special_tokens else set()
        self._source = _choose_source(tokenizer)
        cleans = clean_up_tokenization_spaces
        cleans = tokenizer.clean_up_tokenization_spaces if cleans is None else cleans
        self._cleans = cleans and tokenizer._leaves_spaces
        self._pending: list[str] = []

    def push(self, ids: int | Sequence[int]) -> str:
        """Add ids; return the text that is final.

        Raises:
            InputError: these are not ids.
            TokenizerError: the tokenizer has `errors="strict"` and the bytes are not UTF-8.
        """
        backend = self._tokenizer.backend_tokenizer
        spelt = [
            (index, token)
            for index in as_ids(ids)
            if index not in self._silent and (token := backend.id_to_token(index)) is not None
        ]
        return self._cleaned(self._source.push(spelt), last=False)

    def flush(self) -> str:
        """Return the rest, and start again."""
        text = self._cleaned(self._source.flush(), last=True)
        self._source = _choose_source(self._tokenizer)
        return text

    def _cleaned(self, text: str, *, last: bool) -> str:
        if not self._cleans:
            return text
        certain = len(text)
        while not last and certain and text[certain - 1] in _CLEANED:
            certain -= 1
        if not last and not certain:
            self._pending.append(text)
            return ""
        ready = "".join([*self._pending, text[:certain]])
        self._pending = [text[certain:]]
        return clean_up(ready)


class _Bytes:
    """Byte-level pipelines: a character is final when its bytes are complete."""

    def __init__(self, errors: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, spelt: list[tuple[int, str]]) -> str:
        return self._decode(b"".join(token_bytes(token) for _, token in spelt), last=False)

    def flush(self) -> str:
        return self._decode(b"", last=True)

    def _decode(self, data: bytes, *, last: bool) -> str:
        try:
            return self._decoder.decode(data, last)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"the tokens are not UTF-8 text ({error.reason}) and this tokenizer has "
                "errors='strict'; errors='replace' would write U+FFFD"
            ) from None


class _Tokens:
    """Pipelines with textual tokens: final once a run of single bytes ends.

    Each part is decoded behind one token whose text is known, so that what the pipeline does at
    the beginning of a text (taking one space away) happens there and not inside.
    """

    def __init__(self, tokenizer: Decoder, *, strips: bool, has_bytes: bool) -> None:
        self._decoder = tokenizer.backend_tokenizer.decoder
        self._strips = strips
        self._has_bytes = has_bytes
        self._pending: list[str] = []
        self._begun = False

    def push(self, spelt: list[tuple[int, str]]) -> str:
        tokens = [token for _, token in spelt]
        certain = len(tokens)
        while certain and self._has_bytes and _is_byte(tokens[certain - 1]):
            certain -= 1
        if not certain:
            self._pending += tokens
            return ""
        ready = self._pending + tokens[:certain]
        self._pending = tokens[certain:]
        return self._text(ready)

    def flush(self) -> str:
        return self._text(self._pending)

    def _text(self, tokens: list[str]) -> str:
        if not tokens:
            return ""
        inside = str(self._decoder.decode([_ANCHOR, *tokens]))[len(_ANCHOR) :]
        if self._begun:
            return inside
        # A space is taken from the first text there is, which an empty token is not.
        self._begun = bool(inside) or not self._strips
        return str(self._decoder.decode(tokens))


class _Whole:
    """Unknown pipelines: all text at the end."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._ids: list[int] = []

    def push(self, spelt: list[tuple[int, str]]) -> str:
        self._ids += [index for index, _ in spelt]
        return ""

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)


def _of_another_library(tokenizer: Any) -> Decoder:
    """Return the decoder of another library's tokenizer."""
    decoder = Decoder(tokenizer.backend_tokenizer)
    decoder.errors = "replace"
    decoder.clean_up_tokenization_spaces = bool(tokenizer.clean_up_tokenization_spaces)
    return decoder


def _choose_source(tokenizer: Decoder) -> _Bytes | _Tokens | _Whole:
    steps = decoder_steps(tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _Bytes(tokenizer.errors)
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    ahead, behind = kinds[:fused], steps[fused + 1 :]
    local = all(kind in _LOCAL_STEPS or kind == "ByteFallback" for kind in ahead)
    # Behind `Fuse` there is one text, of which only the first character may be changed.
    strips = [step for step in behind if step["type"] == "Strip" and step["stop"] == 0]
    local &= len(strips) == len(behind) and sum(step["start"] for step in strips) <= 1
    if kinds and local and tokenizer.backend_tokenizer.decoder.decode([_ANCHOR]) == _ANCHOR:
        return _Tokens(tokenizer, strips=bool(strips), has_bytes="ByteFallback" in kinds)
    return _Whole(tokenizer)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
