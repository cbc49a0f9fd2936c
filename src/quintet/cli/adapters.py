"""Adapters on the command line: loaded with a model, and described by `quintet info`."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quintet.cli.output import Fact

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel


def put_adapters(model: "PreTrainedModel", given: Sequence[str], **where: Any) -> None:
    """Put adapters on a model, and use all of them.

    Args:
        model: the model, which may have one that it was loaded with.
        given: each a path or a hub id, or NAME=PATH.
        where: as `source_options` say; of a revision, the model's is meant.

    Raises:
        QuintetError: whatever keeps one from loading.
    """
    if not given:
        return
    options = {
        key: value for key, value in where.items() if key in ("local_files_only", "cache_dir")
    }
    used = [] if model.adapters is None else model.active_adapters()
    for number, text in enumerate(given, start=1):
        name, path = _split(text)
        name = name or f"adapter-{number}"
        model.load_adapter(path, name, **options)
        used.append(name)
    model.set_adapter(used)


def _split(text: str) -> tuple[str | None, str]:
    """Split NAME=PATH; a path that is there may have a sign of its own."""
    name, sign, path = text.partition("=")
    if not sign or not name.isidentifier() or Path(os.path.expanduser(text)).exists():
        return None, text
    return name, path


def facts_of_adapter(name: str, where: dict[str, Any]) -> dict[str, Any]:
    """Describe an adapter: its base model, its rank, and its targets."""
    from quintet.adapters.files import open_adapter
    from quintet.adapters.names import parse

    _, config, weights = open_adapter(name, **where)
    ranks: set[int] = set()
    targets: set[str] = set()
    whole: set[str] = set()
    for tensor, info in weights.tensors.items():
        found = parse(tensor)
        if found is None:
            continue
        last = found.path.rpartition(".")[2]
        if found.own:
            targets.add(last)
        else:
            whole.add(found.path)
        if found.leaf in ("lora_A.weight", "lora_embedding_A") and info.shape:
            ranks.add(info.shape[0])
    kinds = {"DoRA": config.use_dora, "rank-stabilised": config.use_rslora}
    options = [kind for kind, has in kinds.items() if has]
    ranked = ", ".join(map(str, sorted(ranks)))
    if targets & {"experts"}:
        ranked += " (of experts, of all together)"
    nbytes = sum(info.nbytes for info in weights.tensors.values())
    count = sum(math.prod(info.shape) for info in weights.tensors.values())
    return {
        "adapter": name,
        "kind": Fact(", ".join(["LoRA", *options]), {"kind": "LORA", "options": options}),
        "of model": Fact(
            config.base_model_name_or_path or "not said", config.base_model_name_or_path
        ),
        "task": Fact(config.task_type or "not said", config.task_type),
        "rank": Fact(ranked or "none", sorted(ranks)),
        "alpha": config.lora_alpha,
        "changes": Fact(", ".join(sorted(targets)) or "none", sorted(targets)),
        "has whole": Fact(", ".join(sorted(whole)) or "nothing", sorted(whole)),
        "parameters": count,
        "weights": Fact(f"{nbytes:,} bytes", nbytes),
    }
