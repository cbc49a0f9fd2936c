"""Adapters in the layout of PEFT: read, put on a model, combined, merged, trained and written."""

from quintet.adapters.config import LoraConfig

__all__ = ["LoraConfig"]
