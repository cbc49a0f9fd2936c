"""Text to ids and back, exactly as `tokenizer.json` defines it, and chat templates. No torch."""

from tokenizers import AddedToken

from quintet.tokenization.base import PreTrainedTokenizer, PreTrainedTokenizerFast
from quintet.tokenization.batch import BatchEncoding
from quintet.tokenization.lengths import LongTextWarning
from quintet.tokenization.load import load
from quintet.tokenization.qwen2 import Qwen2Tokenizer, Qwen2TokenizerFast
from quintet.tokenization.stream import IncrementalDecoder
from quintet.tokenization.tools import function_schema

__all__ = [
    "AddedToken",
    "BatchEncoding",
    "IncrementalDecoder",
    "LongTextWarning",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "function_schema",
    "load",
]
