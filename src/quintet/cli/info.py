"""`quintet info`: what a model is, read from its files without its weights."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.options import source_options
from quintet.cli.output import show
from quintet.errors import QuintetError, UnsupportedModelError
from quintet.hub import demo_model

if TYPE_CHECKING:
    from quintet.configuration import PreTrainedConfig

__all__ = ["command"]


@click.command("info")
@click.argument("model", required=False)
@source_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    model: str | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Say what MODEL is: family, size, files, cache, tokenizer, and what it will run on.

    Of a hub id, only the small files and the heads of the weights are fetched. Without MODEL, the
    packaged demo model.
    """
    name = str(demo_model()) if model is None else model
    show(_facts(name, where), as_json)


def _facts(name: str, where: dict[str, Any]) -> dict[str, Any]:
    import torch

    from quintet.auto import AutoConfig, AutoTokenizer, family
    from quintet.checkpoint.remote import read_headers
    from quintet.kernels import outlook
    from quintet.modeling.init_on_meta import init_on_meta
    from quintet.modeling.sizes import measure

    config = AutoConfig.from_pretrained(name, **where)
    headers = read_headers(name, **where)
    size = measure(
        init_on_meta(family(config.model_type).find("ForCausalLM"), config), torch.bfloat16
    )
    dtypes = Counter[str]()
    for dtype, count in headers.dtypes.items():
        dtypes[str(dtype).removeprefix("torch.")] += count
    facts: dict[str, Any] = {
        "model": name,
        "family": config.model_type,
        "saved as": ", ".join(config.architectures or ["not said"]),
        "parameters": size.parameters,
        "active": size.active,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "weights": f"{headers.total_bytes:,} bytes"
        + (f" of {', '.join(sorted(dtypes))}" if dtypes else "")
        + f" in {headers.files} file(s)",
        "quantised": _quantised(config),
        "cache": _cache(config, size.cache_per_token, size.state_per_row),
        "attention": _attention(config),
        "kernels": outlook(),
        "backends": _backends(config),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except QuintetError as error:
        facts["tokenizer"] = f"unusable: {error}"
    else:
        chat = "with a chat template" if tokenizer.chat_template else "no chat template"
        facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens, {chat}"
    return facts


def _quantised(config: "PreTrainedConfig") -> str:
    settings = vars(config).get("quantization_config")
    if not settings:
        return "no"
    from quintet.quantization.request import read

    try:
        return type(read(settings)).__name__.removesuffix("Config")
    except UnsupportedModelError as error:
        return f"unusable: {error}"


def _cache(config: "PreTrainedConfig", per_token: int, per_row: int) -> str:
    itemsize = 4 if config.dtype == "float32" else 8 if config.dtype == "float64" else 2
    text = f"{per_token * itemsize:,} bytes a token"
    if config.attention_layers() and vars(config).get("kv_lora_rank"):
        text += " (latent)"
    return f"{text} and {per_row * 4:,} bytes a row" if per_row else text


def _backends(config: "PreTrainedConfig") -> str:
    """Say which backend computes what, on each kind of device there is."""
    import torch

    from quintet.backends import REGISTRY

    # The model's class was imported, and with it what it computes.
    dtype = config.torch_dtype or torch.bfloat16
    said = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        served = REGISTRY.served(device, dtype)
        for backend in dict.fromkeys(served.values()):
            names = ", ".join(name for name, by in served.items() if by == backend)
            said.append(f"on {device}, {backend}: {names}")
    return "; ".join(said)


def _attention(config: "PreTrainedConfig") -> str:
    from quintet.configuration.base import ATTENTION_BACKENDS
    from quintet.ops.attention import attention_backend

    usable = []
    for name in ATTENTION_BACKENDS:
        try:
            attention_backend(name)
        except QuintetError:
            continue
        usable.append(name)
    others = [name for name in usable if name != config.attn_implementation]
    return f"{config.attn_implementation}; also {', '.join(others)}"
