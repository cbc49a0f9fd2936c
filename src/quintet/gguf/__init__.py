"""GGUF, the format of llama.cpp: the checked contents of a file. No torch."""

from quintet.gguf.config import config_values
from quintet.gguf.container import GGUFFile, GGUFTensor, read_gguf, shard_names
from quintet.gguf.names import WeightPart, release_parts
from quintet.gguf.types import BlockType

__all__ = [
    "BlockType",
    "GGUFFile",
    "GGUFTensor",
    "WeightPart",
    "config_values",
    "read_gguf",
    "release_parts",
    "shard_names",
]
