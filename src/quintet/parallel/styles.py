"""Transformers' tensor-parallel plan of a model, for information."""

import re

from torch import nn

from quintet.parallel.placement import table_of
from quintet.sharding import Cut

NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


def plan_of(model: nn.Module) -> dict[str, str]:
    """Return the cut of each matrix along tp by its name; layer numbers are "*".

    "colwise" are a map's outputs, "rowwise" its inputs; "packed_colwise" outputs that are several
    in one, of which each is cut by itself.
    """
    table = table_of(model)
    plan = {}
    for name, cuts in table.parameters.items():
        path = name.removesuffix(".weight")
        inner = [cut for cut in cuts if cut.axis in ("tp", "etp")]
        # A stack of experts is a parameter of its own; vectors go with what they belong to.
        if inner and path not in table.spread and (path != name or inner[0].axis == "etp"):
            plan[NUMBERS.sub("*", path)] = _style(path, inner[0], len(cuts), table.vocabulary)
    return plan


def _style(path: str, cut: Cut, dims: int, vocabulary: tuple[str, ...]) -> str:
    if path in vocabulary:
        return "embedding_rowwise" if path.endswith("embed_tokens") else "colwise_gather_output"
    # Of stacks the first dimension is that of experts.
    if cut.dim == dims:
        return "rowwise"
    return "packed_colwise" if len(cut.sections) > 1 else "colwise"
