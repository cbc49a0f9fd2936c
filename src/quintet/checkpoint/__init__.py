"""Safetensors checkpoints: checked before reading, written atomically."""

from quintet.checkpoint.consistency import read_consistently, recover
from quintet.checkpoint.expert_stacks import (
    StackExperts,
    StackPiece,
    count_pieces,
    pieces,
    split_tensors,
)
from quintet.checkpoint.gguf import GGUFCheckpoint
from quintet.checkpoint.header import TensorInfo
from quintet.checkpoint.matching import Difference, Mismatch, compare
from quintet.checkpoint.opening import open_weights
from quintet.checkpoint.reading import Checkpoint
from quintet.checkpoint.sizes import parse_size
from quintet.checkpoint.sources import InMemory, Renamed, Weights
from quintet.checkpoint.writing import save, save_stream

__all__ = [
    "Checkpoint",
    "Difference",
    "GGUFCheckpoint",
    "InMemory",
    "Mismatch",
    "Renamed",
    "StackExperts",
    "StackPiece",
    "TensorInfo",
    "Weights",
    "compare",
    "count_pieces",
    "open_weights",
    "parse_size",
    "pieces",
    "read_consistently",
    "recover",
    "save",
    "save_stream",
    "split_tensors",
]
