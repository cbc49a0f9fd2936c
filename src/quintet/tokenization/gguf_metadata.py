"""Writes a tokenizer as GGUF metadata."""

import json
from array import array
from collections.abc import Sequence
from typing import Any

from quintet.errors import InputError, TokenizerError, UnsupportedModelError, shown
from quintet.gguf.cursor import Value
from quintet.tokenization.base import PreTrainedTokenizer
from quintet.tokenization.gguf import CONTROL, KEY, NORMAL, ROLES, TEMPLATE, UNUSED, USER_DEFINED
from quintet.tokenization.partings import PARTINGS, parting_of


def gguf_metadata(
    tokenizer: PreTrainedTokenizer, vocab_size: int, end_ids: Sequence[int] = ()
) -> dict[str, Value]:
    """Return the GGUF metadata of a byte-level tokenizer.

    Args:
        tokenizer: which is written.
        vocab_size: the rows of the model's embeddings; those without a token are filled up.
        end_ids: tokens that end an answer, beside `eos_token`. The file has room for one more.

    Raises:
        UnsupportedModelError: llama.cpp has no name for how it parts texts.
        InputError: it has tokens beyond the model's.
        TokenizerError: it adds tokens to a text that the file cannot say.
    """
    pipeline = tokenizer.backend_tokenizer
    model = json.loads(pipeline.model.__getstate__())
    name = parting_of(pipeline) if model["type"] == "BPE" else None
    if name is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} parts texts in a way that GGUF files have no name for; "
            f"there are those of {', '.join(PARTINGS)}"
        )
    texts, kinds = _tokens(tokenizer, vocab_size)
    begins, ends = _surrounding(tokenizer)
    metadata: dict[str, Value] = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": name,
        f"{KEY}tokens": texts,
        f"{KEY}token_type": kinds,
        f"{KEY}merges": [_merge(merge) for merge in model["merges"]],
        f"{KEY}add_bos_token": begins,
        f"{KEY}add_eos_token": ends,
        f"{KEY}add_space_prefix": False,
    }
    named = tokenizer.special_tokens_map.items()
    known = tokenizer.get_vocab()
    ids = {role: known[token] for role, token in named if role in ROLES}
    eos = ids.setdefault("eos_token", end_ids[0]) if end_ids else ids.get("eos_token")
    metadata |= {f"{KEY}{ROLES[role]}_token_id": index for role, index in ids.items()}
    if others := [index for index in end_ids if index != eos]:
        metadata[f"{KEY}eot_token_id"] = others[0]
    templates = tokenizer.chat_template
    by_name = templates if isinstance(templates, dict) else {"default": templates}
    for template, source in by_name.items():
        if source is not None:
            metadata[TEMPLATE if template == "default" else f"{TEMPLATE}.{template}"] = source
    return metadata


def _tokens(tokenizer: PreTrainedTokenizer, vocab_size: int) -> tuple[list[str], "array[int]"]:
    added = tokenizer.added_tokens_decoder
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    last = max(by_id, default=-1)
    if last >= vocab_size:
        raise InputError(
            f"the tokenizer has {shown(by_id[last])} with the id {last}, and the model has "
            f"{vocab_size} embeddings; resize_token_embeddings gives it more"
        )
    texts = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = array("i", [NORMAL if index in by_id else UNUSED for index in range(vocab_size)])
    for index, token in added.items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    return texts, kinds


def _merge(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _surrounding(tokenizer: PreTrainedTokenizer) -> tuple[bool, bool]:
    """Return whether the pipeline adds a begin and an end token."""
    found = tokenizer.backend_tokenizer.encode("").ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for begins in (False, True):
        for ends in (False, True):
            if found == [bos] * begins + [eos] * ends:
                return begins, ends
    raise TokenizerError(
        f"the tokenizer adds {tokenizer.convert_ids_to_tokens(found)} to a text; a GGUF file can "
        "say bos_token before it and eos_token behind it"
    )
