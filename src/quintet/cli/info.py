"""`quintet info`: what a model is, read from its files without its weights."""

import json
import math
from typing import Any

import click

from quintet.errors import QuintetError
from quintet.hub import CONFIG_PATTERNS, TOKENIZER_PATTERNS, demo_model, locate, locate_weights

__all__ = ["command"]


@click.command("info")
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--cache-dir", help="Where downloads are kept.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    model: str | None,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Say what MODEL is: family, size, files, context, cache and tokenizer.

    Without MODEL, the packaged demo model.
    """
    name = str(demo_model()) if model is None else model
    root = locate(
        name,
        (*CONFIG_PATTERNS, *TOKENIZER_PATTERNS),
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=offline,
    )
    root = locate_weights(name, revision=revision, cache_dir=cache_dir, local_files_only=offline)
    facts = _facts(name, str(root))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{key:{width}}  {shown}")


def _facts(name: str, root: str) -> dict[str, Any]:
    from pathlib import Path

    from quintet.auto import AutoConfig, AutoTokenizer
    from quintet.checkpoint import Checkpoint

    config = AutoConfig.from_pretrained(root)
    checkpoint = Checkpoint.open(Path(root))
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    facts: dict[str, Any] = {
        "model": name,
        "family": config.model_type,
        "saved as": ", ".join(config.architectures or ["not said"]),
        "parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "weights": f"{checkpoint.total_bytes:,} bytes of {', '.join(dtypes)} in "
        f"{len({t.file for t in checkpoint.tensors.values()})} file(s)",
        "attention": config.attn_implementation,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(root)
    except QuintetError as error:
        facts["tokenizer"] = f"unusable: {error}"
    else:
        chat = "with a chat template" if tokenizer.chat_template else "no chat template"
        facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, {chat}"
    return facts
