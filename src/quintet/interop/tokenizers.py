"""A tokenizer as one of Transformers, for tools that need their class."""

import copy
from typing import Any

from quintet.errors import MissingDependencyError
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.options import NAMED_TOKENS


def to_transformers(tokenizer: PreTrainedTokenizer) -> Any:
    """Return a `transformers.PreTrainedTokenizerFast` that reads and writes as a tokenizer does.

    It has a copy of the pipeline, the special tokens, the chat templates, the sides and the
    lengths; what is changed in one is not seen by the other.

    Raises:
        MissingDependencyError: Transformers is not installed.
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingDependencyError(
            "quintet.interop needs Transformers; install it with pip install transformers"
        ) from error
    usual = dict(tokenizer.special_tokens_map)
    own = {name: usual.pop(name) for name in [*usual] if name not in NAMED_TOKENS}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        **usual,
        model_specific_special_tokens=own,
        extra_special_tokens=tokenizer.additional_special_tokens,
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        split_special_tokens=tokenizer.split_special_tokens,
        name_or_path=tokenizer.name_or_path,
    )
