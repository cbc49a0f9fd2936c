"""Resolves a name to a GGUF file: a path, a hub id, or another program's model."""

from quintet.sources.choice import models_among
from quintet.sources.find import find_gguf, is_gguf
from quintet.sources.found import FoundModel
from quintet.sources.ollama import names as ollama_names
from quintet.sources.smollm2 import fetch_smollm2

__all__ = ["FoundModel", "fetch_smollm2", "find_gguf", "is_gguf", "models_among", "ollama_names"]
