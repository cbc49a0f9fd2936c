"""Bridges to tools that require Transformers' classes."""

from quintet.interop.bridge import as_transformers
from quintet.interop.evaluation import register_lm_eval
from quintet.interop.tokenizers import to_transformers

__all__ = ["as_transformers", "register_lm_eval", "to_transformers"]
