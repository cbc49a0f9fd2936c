"""GGUF, the format of llama.cpp: what a file says, checked first. No torch."""

from quintet.gguf.container import GGUFFile, GGUFTensor, read_gguf, shard_names
from quintet.gguf.types import BlockType

__all__ = ["BlockType", "GGUFFile", "GGUFTensor", "read_gguf", "shard_names"]
