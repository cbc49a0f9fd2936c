"""`quintet info`: what a model is, read from its files without its weights."""

from typing import TYPE_CHECKING, Any

import click

from quintet.cli.adapters import facts_of_adapter
from quintet.cli.options import source_options
from quintet.cli.output import Fact, show
from quintet.errors import QuintetError, UnsupportedModelError
from quintet.folder import AdapterFolderError
from quintet.hub import demo_model

if TYPE_CHECKING:
    from quintet.configuration import PreTrainedConfig


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
    try:
        facts = _facts(name, where)
    except AdapterFolderError:
        facts = facts_of_adapter(name, where)
    show(facts, as_json)


def _facts(name: str, where: dict[str, Any]) -> dict[str, Any]:
    import torch

    from quintet.auto import AutoConfig, family
    from quintet.checkpoint.remote import read_headers
    from quintet.kernels import outlook
    from quintet.modeling.init_on_meta import init_on_meta
    from quintet.modeling.sizes import measure

    config = AutoConfig.from_pretrained(name, **where)
    headers = read_headers(name, **where)
    size = measure(
        init_on_meta(family(config.model_type).find("ForCausalLM"), config), torch.bfloat16
    )
    facts: dict[str, Any] = {
        "model": name,
        "family": config.model_type,
        "saved as": Fact(", ".join(config.architectures or ["not said"]), config.architectures),
        "parameters": size.parameters,
        "active": size.active,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "weights": Fact(
            f"{headers.total_bytes:,} bytes"
            + (f" of {', '.join(sorted(headers.dtypes))}" if headers.dtypes else "")
            + f" in {headers.files} file(s)",
            {
                "bytes": headers.total_bytes,
                "dtypes": dict(headers.dtypes),
                "files": headers.files,
            },
        ),
        "quantised": _quantised(config),
        **_number_formats(name, config, where),
        "cache": _cache(config, size.cache_per_token, size.state_per_row),
        "attention": _attention(config),
        "kernels": outlook(),
        "backends": _backends(config),
    }
    facts["tokenizer"] = _tokenizer(name, where)
    return facts


def _tokenizer(name: str, where: dict[str, Any]) -> Fact:
    from quintet.auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except QuintetError as error:
        return Fact(f"unusable: {error}", {"error": str(error)})
    kind, talks = type(tokenizer).__name__, bool(tokenizer.chat_template)
    chat = "with a chat template" if talks else "no chat template"
    return Fact(
        f"{kind}, {len(tokenizer):,} tokens, {chat}",
        {"class": kind, "tokens": len(tokenizer), "chat_template": talks},
    )


def _quantised(config: "PreTrainedConfig") -> Fact:
    settings = vars(config).get("quantization_config")
    if not settings:
        return Fact("no", None)
    from quintet.quantization.request import read

    try:
        method = type(read(settings)).__name__.removesuffix("Config")
    except UnsupportedModelError as error:
        return Fact(f"unusable: {error}", {"error": str(error)})
    return Fact(method, method)


def _number_formats(
    name: str, config: "PreTrainedConfig", where: dict[str, Any]
) -> dict[str, Fact]:
    """Describe the formats that the tensors of a GGUF file will have."""
    import torch

    from quintet.auto import family
    from quintet.checkpoint import open_weights
    from quintet.hub import locate_weights
    from quintet.modeling.holding import in_words, number_formats
    from quintet.modeling.init_on_meta import init_on_meta
    from quintet.modeling.key_mapping import map_keys
    from quintet.quantization import resolve_quantization

    root = locate_weights(name, **where)
    if not root.is_file():
        return {}
    weights = open_weights(root)
    model = init_on_meta(family(config.model_type).find("ForCausalLM"), config)
    settings = vars(config).get("quantization_config")
    request = resolve_quantization(settings, None, None, torch.device("cpu"))
    mapping = map_keys(model, weights.tensors, stored_as=request.source)
    mapping.difference.raise_if_incomplete(str(root))
    scheme = request.scheme(mapping.formats)
    dtype = config.torch_dtype or torch.bfloat16
    slots = {} if scheme is None else model.quantize_modules(scheme, dtype)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.endswith(model.keep_in_fp32) else dtype

    counts = number_formats(mapping, weights.tensors, slots, dtype_of)
    listed = [
        {"stored": kind, "held": number_format, "tensors": count}
        for (kind, number_format), count in counts.most_common()
    ]
    return {"held as": Fact(in_words(counts), listed)}


def _cache(config: "PreTrainedConfig", per_token: int, per_row: int) -> Fact:
    itemsize = 4 if config.dtype == "float32" else 8 if config.dtype == "float64" else 2
    sizes = {"bytes_per_token": per_token * itemsize, "bytes_per_row": per_row * 4}
    text = f"{sizes['bytes_per_token']:,} bytes a token"
    if config.attention_layers() and vars(config).get("kv_lora_rank"):
        text += " (latent)"
    return Fact(f"{text} and {per_row * 4:,} bytes a row" if per_row else text, sizes)


def _backends(config: "PreTrainedConfig") -> Fact:
    """Describe the backends of each kind of device there is."""
    import torch

    from quintet.backends import REGISTRY

    # The model's class was imported, and with it what it computes.
    dtype = config.torch_dtype or torch.bfloat16
    found: dict[str, dict[str, list[str]]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        found[device] = {}
        for name, backend in REGISTRY.served(device, dtype).items():
            found[device].setdefault(backend, []).append(name)
    states = [
        f"on {device}, {backend}: {', '.join(names)}"
        for device, served in found.items()
        for backend, names in served.items()
    ]
    requested = [backend for backend in REGISTRY.backends if backend.on_request]
    found["on request"] = {
        backend.name: [backend.missing() or _state(backend.name in REGISTRY.on)]
        for backend in reversed(requested)
    }
    on_request = [f"{name} ({why})" for name, (why,) in found["on request"].items()]
    return Fact("; ".join((*states, f"on request: {', '.join(on_request)}")), found)


def _state(is_on: bool) -> str:
    return "asked for" if is_on else "there, and not asked for"


def _attention(config: "PreTrainedConfig") -> Fact:
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
    return Fact(
        f"{config.attn_implementation}; also {', '.join(others)}",
        {"chosen": config.attn_implementation, "also": others},
    )
