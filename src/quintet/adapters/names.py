"""Names of adapter tensors in files: `base_model.model.PATH.lora_A.weight`."""

import re
from typing import NamedTuple

# What PEFT wraps a model in.
PREFIX = "base_model.model."
BASE = ".base_layer"
DELTA = "token_adapter.trainable_tokens_delta"
_LEAVES = re.compile(
    r"(?P<path>.+?)(?P<nest>(\.base_layer)*)\."
    r"(?P<leaf>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?"
    r"|token_adapter\.trainable_tokens_delta)"
)
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d{1,7})\.(?P<part>\w+)")


class Name(NamedTuple):
    """The parsed name of a tensor.

    Attributes:
        path: of the module in the model.
        leaf: which of an adapter's tensors it is, or the name of a tensor of the module itself,
            which it is in the place of.
        depth: in how many wrappers of the module it is, where one of PEFT's is within another.
        own: whether it is one of the adapter's tensors.
    """

    path: str
    leaf: str
    depth: int
    own: bool


def parse(name: str) -> Name | None:
    """Parse a tensor's name; None if no model's module can have it."""
    rest = name.removeprefix(PREFIX)
    if match := _LEAVES.fullmatch(rest):
        leaf = match["leaf"].replace("magnitude_vector.weight", "magnitude_vector")
        return Name(match["path"], leaf, match["nest"].count(BASE), True)
    path, _, leaf = rest.rpartition(".")
    depth = 0
    while path.endswith(BASE):
        path, depth = path.removesuffix(BASE), depth + 1
    return Name(path, leaf, depth, False) if path and leaf else None


def path_of_expert(path: str) -> tuple[str, int, str] | None:
    """Split a path into the experts' path, the expert's number and its map, or None."""
    match = _EXPERT.fullmatch(path)
    return None if match is None else (match["experts"], int(match["expert"]), match["part"])


def name_of(path: str, leaf: str, depth: int = 0) -> str:
    """Return a tensor's name in files."""
    return f"{PREFIX}{path}{BASE * depth}.{leaf}"
