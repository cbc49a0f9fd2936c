"""Safetensors files and named tensors: checked before reading, written whole or not at all."""

from quintet.checkpoint.matching import Difference, Mismatch, compare
from quintet.checkpoint.reading import Checkpoint, TensorInfo
from quintet.checkpoint.rules import Piece, StackExperts, pieces, split_tensors
from quintet.checkpoint.writing import parse_size, save

__all__ = [
    "Checkpoint",
    "Difference",
    "Mismatch",
    "Piece",
    "StackExperts",
    "TensorInfo",
    "compare",
    "parse_size",
    "pieces",
    "save",
    "split_tensors",
]
