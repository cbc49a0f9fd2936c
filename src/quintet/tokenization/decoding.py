"""Ids to text."""

import codecs
import json
from collections.abc import Sequence
from typing import Any

from tokenizers.models import BPE

from quintet.errors import InputError, TokenizerError, shown
from quintet.tokenization.arrays import as_ids
from quintet.tokenization.bytelevel import token_bytes
from quintet.tokenization.guard import guarded
from quintet.tokenization.vocabulary import Vocabulary

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Decoder(Vocabulary):
    """The decoding methods of a tokenizer."""

    errors: str
    clean_up_tokenization_spaces: bool

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Return the text of ids: an integer, a list, an array or a tensor of them.

        A list of rows gives a list of texts. Ids outside of the vocabulary (a model's padded
        embedding rows) give no text. `clean_up_tokenization_spaces` takes out the spaces that
        WordPiece and its like leave before punctuation; a BPE model leaves none, so it does
        nothing there.

        Raises:
            InputError: these are not ids.
            TokenizerError: `errors="strict"` and the bytes are not UTF-8.
        """
        ids = as_ids(token_ids)
        if ids and isinstance(ids[0], list):
            return [
                self._decode_one(row, skip_special_tokens, clean_up_tokenization_spaces)
                for row in ids
            ]
        return self._decode_one(ids, skip_special_tokens, clean_up_tokenization_spaces)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Return the text of each row; a single row gives a list of one."""
        if not (rows := as_ids(sequences)):
            return []
        text = self.decode(rows, skip_special_tokens, clean_up_tokenization_spaces)
        return text if isinstance(text, list) else [text]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens to text."""
        if self.errors != "replace":
            return self._strictly(list(tokens))
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    def _decode_one(self, ids: list[int], skip: bool, clean: bool | None) -> str:
        if self.errors == "replace":
            with guarded("the pipeline cannot decode these tokens"):
                text = self._tokenizer.decode(ids, skip_special_tokens=skip)
        else:
            text = self._strictly(self._spelt(ids, skip))
        wanted = self.clean_up_tokenization_spaces if clean is None else clean
        return clean_up(text) if wanted and self._leaves_spaces else text

    @property
    def _leaves_spaces(self) -> bool:
        # A BPE model writes a space only where the text had one: taking it out would be damage.
        return not isinstance(self._tokenizer.model, BPE)

    def _spelt(self, ids: list[int], skip: bool) -> list[str]:
        """Return the tokens that produce text."""
        skipped = self._silent_ids() if skip else set()
        tokens = [self._tokenizer.id_to_token(index) for index in ids if index not in skipped]
        return [token for token in tokens if token is not None]

    def _silent_ids(self) -> set[int]:
        """Return the ids `skip_special_tokens` leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}

    def _strictly(self, tokens: list[str]) -> str:
        spelt = b"".join(map(token_bytes, tokens))
        try:
            return spelt.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"the tokens are not UTF-8 text ({error.reason} at byte {error.start}) and this "
                "tokenizer has errors='strict'; errors='replace' would write U+FFFD"
            ) from None

    def _check_errors(self) -> None:
        """Refuse an `errors` that the pipeline cannot obey.

        Raises:
            InputError: not a name of an error handler, or not a byte-level pipeline.
        """
        if self.errors == "replace":
            return
        try:
            codecs.lookup_error(self.errors)
        except LookupError:
            raise InputError(
                f"errors={shown(self.errors)} has to be 'replace', 'strict', 'ignore' or another "
                "handler bytes.decode knows"
            ) from None
        if [step["type"] for step in decoder_steps(self)] != ["ByteLevel"]:
            raise InputError(
                f"errors={shown(self.errors)} can only be obeyed by a byte-level tokenizer; "
                "leave it at 'replace'"
            )


def decoder_steps(tokenizer: Vocabulary) -> list[dict[str, Any]]:
    """Return the steps of a pipeline's decoder."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    if state["type"] == "Sequence":
        steps: list[dict[str, Any]] = state["decoders"]
        return steps
    return [state]


def clean_up(text: str) -> str:
    """Remove spaces before punctuation."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text
