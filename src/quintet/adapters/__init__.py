"""Adapters in PEFT's layout: loaded, applied, combined, merged, trained and saved."""

from quintet.adapters.config import LoraConfig

__all__ = ["LoraConfig"]
