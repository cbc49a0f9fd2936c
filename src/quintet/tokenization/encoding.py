"""Text to ids: one call for a text, a batch, pairs, or texts that are already words."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

from tokenizers import Encoding

from quintet.errors import InputError, shown
from quintet.tokenization.arrays import as_lists
from quintet.tokenization.batch import BatchEncoding
from quintet.tokenization.guard import guarded
from quintet.tokenization.inputs import Text, batch_of
from quintet.tokenization.lengths import (
    LongTexts,
    Truncation,
    check_whole,
    pad_target,
    padding_strategy,
    truncation_strategy,
)
from quintet.tokenization.options import EncodeOptions, Side, check_choice, check_names
from quintet.tokenization.rows import TokenizedRow
from quintet.tokenization.vocabulary import Vocabulary, share_pipeline

# What tokenizer_config.json says instead of "no limit" is 10^30; nothing real comes near this.
UNBOUNDED = 10**20


class Encoder(Vocabulary):
    """The encoding methods of a tokenizer."""

    padding_side: Side
    truncation_side: Side
    model_max_length: int
    model_input_names: list[str]
    split_special_tokens: bool
    _long_texts: LongTexts

    def __call__(
        self, text: Text, text_pair: Text | None = None, **options: Unpack[EncodeOptions]
    ) -> BatchEncoding:
        """Encode a text, or a list of them, each with its pair if there is one.

        Args:
            text: a string, or a list of strings or of pairs of them; with
                `is_split_into_words=True` a list of words in place of each string.
            text_pair: the second text, or as many of them as there are texts.
            options:
                padding (False): True or "longest" for the longest row, "max_length" for
                `max_length`; `padding_side` and `pad_to_multiple_of` shape it.
                truncation (False): True or "longest_first", "only_first", "only_second", to
                `max_length`, or `model_max_length` if that is not given; the side is the
                attribute `truncation_side`. `return_overflowing_tokens=True` returns what was
                cut off as further rows that overlap by `stride` tokens. `max_length` with
                neither truncation nor padding given cuts, too.
                return_tensors (None): "pt" or "np".
                add_special_tokens (True): whether the pipeline adds what it adds around a text.
                split_special_tokens: whether special tokens written in a text are read as
                ordinary text; the attribute of the same name where it is not given.
                return_attention_mask, return_token_type_ids (as in `model_input_names`),
                return_special_tokens_mask, return_offsets_mapping, return_length (False):
                further columns.
                verbose (True): whether to warn: once of a text longer than `model_max_length`,
                and of a `max_length` without effect.

        Raises:
            InputError: text or an option is not usable as given.
        """
        check_names(f"{type(self).__name__}(...)", options, EncodeOptions.__annotations__)
        as_words = options.get("is_split_into_words", False)
        inputs, batched = batch_of(text, text_pair, as_words)
        encodings = self._encode(
            inputs,
            as_words=as_words,
            add_special_tokens=options.get("add_special_tokens", True),
            split_special_tokens=options.get("split_special_tokens"),
        )
        return self._finish([TokenizedRow(encoding) for encoding in encodings], batched, options)

    def encode(
        self, text: Text, text_pair: Text | None = None, **options: Unpack[EncodeOptions]
    ) -> list[int]:
        """Return the ids of one text; options are those of `tokenizer(...)`."""
        ids: list[int] = self(text, text_pair, **options)[self.model_input_names[0]]
        return ids

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        **options: Unpack[EncodeOptions],
    ) -> list[str]:
        """Return the tokens of one text, without special tokens."""
        options.setdefault("add_special_tokens", False)
        return self(text, pair, **options).tokens()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return the number of tokens added around a text or pair."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad rows of ids: columns of rows, one row, or a list of rows.

        `labels` are padded with -100, which losses leave out.

        Raises:
            InputError: there are no input_ids, or a column cannot be padded.
        """
        check_whole(max_length=max_length, pad_to_multiple_of=pad_to_multiple_of)
        columns, batched = _columns(encoded_inputs, self.model_input_names[0])
        main = self.model_input_names[0]
        lengths = [len(row) for row in columns[main]]
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_attention_mask and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * length for length in lengths]
        target = self._pad_target(lengths, padding, max_length, pad_to_multiple_of)
        if target is not None:
            side = padding_side or self.padding_side
            check_choice("padding_side", side, ("left", "right"))
            fills = {main: self.pad_token_id, **_FILLS}
            for name, rows in columns.items():
                if not all(isinstance(row, list) for row in rows):
                    continue
                if name not in fills:
                    raise InputError(
                        f"cannot pad the column {name!r}; leave it out, or pad it beforehand"
                    )
                columns[name] = [_filled(row, target, side, fills[name]) for row in rows]
        if not batched and return_tensors is None:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors)

    # -- steps --------------------------------------------------------------------------------

    def _encode(
        self,
        inputs: list[Any],
        *,
        as_words: bool = False,
        add_special_tokens: bool,
        split_special_tokens: bool | None = None,
    ) -> list[Encoding]:
        backend = self._tokenizer
        if split_special_tokens not in (None, self.split_special_tokens):
            backend = share_pipeline(backend, added_tokens=True)
            backend.encode_special_tokens = bool(split_special_tokens)
        with guarded("the pipeline cannot encode this text"):
            try:
                return backend.encode_batch(
                    inputs, is_pretokenized=as_words, add_special_tokens=add_special_tokens
                )
            # These are strings, as was checked; only half of a surrogate pair is refused so.
            except TypeError:
                raise InputError(
                    "the text holds half of a surrogate pair, so it is not Unicode text; repair "
                    "it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
                ) from None

    def _finish(
        self, rows: list[TokenizedRow], batched: bool, options: EncodeOptions
    ) -> BatchEncoding:
        """Truncate and pad rows, and build the requested columns."""
        overflow = options.get("return_overflowing_tokens", False)
        cut = self._cut(options)
        sources = list(range(len(rows)))
        if cut is not None:
            pieces = [cut.apply(row, overflow=overflow) for row in rows]
            sources = [index for index, piece in enumerate(pieces) for _ in piece]
            rows = [row for piece in pieces for row in piece]
        elif options.get("max_length") is None and options.get("verbose", True):
            self._long_texts.check(map(len, rows), self.model_max_length)
        rows = self._pad_rows(rows, cut, options)
        columns = self._lay_out(rows, options)
        if overflow:
            columns["overflow_to_sample_mapping"] = sources
        kind = options.get("return_tensors")
        if not batched and kind is None and not overflow:
            columns = {name: column[0] for name, column in columns.items()}
        return BatchEncoding(columns, rows, tensor_type=kind)

    def _cut(self, options: EncodeOptions) -> Truncation | None:
        max_length, stride = options.get("max_length"), options.get("stride", 0)
        multiple = options.get("pad_to_multiple_of")
        check_whole(max_length=max_length, stride=stride, pad_to_multiple_of=multiple)
        truncation, padding = options.get("truncation"), options.get("padding", False)
        if truncation is None and not padding:
            truncation = max_length is not None
        strategy = truncation_strategy(truncation)
        check_choice(
            "truncation",
            strategy,
            ("do_not_truncate", "longest_first", "only_first", "only_second"),
        )
        check_choice("truncation_side", self.truncation_side, ("left", "right"))
        if strategy == "do_not_truncate":
            useless = max_length is not None and padding != "max_length"
            if useless and options.get("verbose", True):
                warnings.warn(
                    f"max_length={max_length} has no effect without truncation=True "
                    "or padding='max_length'",
                    stacklevel=4,
                )
            if stride or options.get("return_overflowing_tokens"):
                raise InputError("stride and return_overflowing_tokens need truncation=True")
            return None
        if max_length is None:
            if self.model_max_length > UNBOUNDED:
                return None
            max_length = self.model_max_length
        if multiple and options.get("padding") and max_length % multiple:
            raise InputError(
                f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}, "
                "so rows that are cut would be padded beyond it"
            )
        return Truncation(
            strategy=strategy, max_length=max_length, side=self.truncation_side, stride=stride
        )

    def _pad_rows(
        self, rows: list[TokenizedRow], cut: Truncation | None, options: EncodeOptions
    ) -> list[TokenizedRow]:
        padding = options.get("padding", False)
        max_length = options.get("max_length")
        side = options.get("padding_side") or self.padding_side
        check_choice("padding_side", side, ("left", "right"))
        lengths = [len(row) for row in rows]
        multiple = options.get("pad_to_multiple_of")
        target = self._pad_target(lengths, padding, max_length, multiple)
        if target is None:
            return rows
        pad_id, pad_token = self.pad_token_id, self.pad_token
        assert pad_id is not None
        assert pad_token is not None
        missing = [max(target - length, 0) for length in lengths]
        sides = [(0, count) if side == "right" else (count, 0) for count in missing]
        return [
            row.padded(left, right, pad_id=pad_id, pad_token=pad_token)
            for row, (left, right) in zip(rows, sides, strict=True)
        ]

    def _pad_target(
        self,
        lengths: list[int],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
    ) -> int | None:
        if max_length is None and self.model_max_length <= UNBOUNDED:
            max_length = self.model_max_length
        target = pad_target(lengths, padding_strategy(padding), max_length, multiple)
        if target is not None and self.pad_token_id is None:
            raise InputError(
                f"padding={padding!r} needs a padding token and this tokenizer has none; "
                "set one: tokenizer.pad_token = tokenizer.eos_token"
            )
        return target

    def _lay_out(self, rows: list[TokenizedRow], options: EncodeOptions) -> dict[str, list[Any]]:
        names = self.model_input_names
        columns: dict[str, list[Any]] = {names[0]: [row.ids for row in rows]}
        with_types = options.get("return_token_type_ids")
        if "token_type_ids" in names if with_types is None else with_types:
            columns["token_type_ids"] = [row.type_ids for row in rows]
        with_mask = options.get("return_attention_mask")
        if "attention_mask" in names if with_mask is None else with_mask:
            columns["attention_mask"] = [row.attention_mask for row in rows]
        if options.get("return_special_tokens_mask"):
            columns["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if options.get("return_offsets_mapping"):
            columns["offset_mapping"] = [row.offsets for row in rows]
        if options.get("return_length"):
            columns["length"] = [len(row) for row in rows]
        return columns


_FILLS: dict[str, Any] = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
    "labels": -100,
}


def _filled(row: list[Any], target: int, side: Side, fill: Any) -> list[Any]:
    padding = [fill] * (target - len(row))
    return row + padding if side == "right" else padding + row


def _columns(
    given: Mapping[str, Any] | Sequence[Mapping[str, Any]], main: str
) -> tuple[dict[str, list[Any]], bool]:
    """Return rows as columns, and whether they were a batch."""
    if isinstance(given, Mapping):
        columns = {name: as_lists(column) for name, column in given.items()}
    else:
        rows = list(given) if isinstance(given, Iterable) else []
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise InputError(
                "pad needs at least one row, or columns, as the tokenizer returns them, and got "
                f"{shown(given)}"
            )
        if any(row.keys() != rows[0].keys() for row in rows):
            raise InputError("the rows to pad have different columns")
        columns = {name: [as_lists(row[name]) for row in rows] for name in rows[0]}
    if main not in columns:
        raise InputError(f"pad needs {main!r} and got {', '.join(columns) or 'no columns'}")
    for name, column in columns.items():
        if not isinstance(column, list):
            raise InputError(f"pad got {name}={shown(column)}, which has to be a list")
    batched = not columns[main] or isinstance(columns[main][0], list)
    return columns if batched else {name: [row] for name, row in columns.items()}, batched
