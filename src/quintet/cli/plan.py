"""`quintet plan`: whether a model fits, before anything of its weights is fetched."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.options import source_options
from quintet.cli.output import Fact, show, size_of
from quintet.cli.plan_options import WorldOptions, world_options
from quintet.cli.plan_train import plan_training_in_world
from quintet.cli.plan_world import plan_in_world
from quintet.cli.settings import COUNT
from quintet.errors import DoesNotFitError, InputError, OfflineError

if TYPE_CHECKING:
    import torch

    from quintet.checkpoint import TensorInfo
    from quintet.configuration import PreTrainedConfig
    from quintet.modeling.placement import ModelPart
    from quintet.modeling.sizes import Size

    Tensors = Mapping[str, TensorInfo]

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTISED = ("int8", "int4", "nf4", "fp8")
# How many tokens of a prompt are counted as being worked on at once.
PROMPT = 512
AS_STORED = "the files' own quantisation"
MEMORY = "--device with its own, as in --device h100,memory=96GB"


@click.command("plan")
@click.argument("model")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--quantize", type=click.Choice(QUANTISED), help="Hold the weights in fewer bits.")
@click.option("--context", type=COUNT, help="Tokens a row.  [default: at most 4096]")
@click.option(
    "--batch-size",
    "--batch",
    "batch",
    type=COUNT,
    default=1,
    show_default=True,
    help="Rows at once.",
)
@click.option(
    "--speculate",
    type=click.Choice(["off", "mtp", "lookup"]),
    default="off",
    show_default=True,
    help="How rows draft: prediction layers (mtp) keep something of each token.",
)
@click.option(
    "--memory",
    multiple=True,
    help="Of a device, as 24GB or 8x80GB; may be given again.  [default: what this machine has]",
)
@world_options
@source_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    model: str,
    dtype: str,
    quantize: str | None,
    context: int | None,
    batch: int,
    speculate: str,
    memory: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Say whether MODEL fits, at which dtype, context and batch, and lay it out over devices.

    From config.json and the heads of the files: no weights are fetched. Ends with 5 if it does not
    fit. With --world and --device, say how to split it over many of them, what each then needs, and
    how fast it can be.
    """
    from quintet.auto import AutoConfig

    options = WorldOptions.taken(given)
    where = given
    options.check()
    if options.is_requested and memory:
        raise InputError(f"--memory is of one process's devices; of a world give {MEMORY}")
    predicts = speculate == "mtp"
    if options.train and speculate != "off":
        raise InputError("--speculate is of answers, and --train plans a training; leave one out")
    config = AutoConfig.from_pretrained(_folder(model), **where)
    most = config.max_position_embeddings
    if context is not None and context > most:
        raise InputError(
            f"--context {context:,} is more than the {most:,} tokens this model has positions for "
            "(max_position_embeddings)"
        )
    files, tensors = _files(_folder(model), where)
    tokens = context or min(4096, config.max_position_embeddings)
    if options.train:
        facts, reason = plan_training_in_world(
            config, options, dtype=dtype, quantize=quantize, context=tokens, batch=batch
        )
    elif options.is_requested:
        facts, reason = plan_in_world(
            config,
            options,
            dtype=dtype,
            quantize=quantize,
            context=tokens,
            batch=batch,
            tensors=tensors,
            predicts=predicts,
        )
    else:
        facts, reason = _plan(
            config, dtype, quantize, tokens, batch, memory, tensors, predicts=predicts
        )
    facts = {"model": model, **files, **facts}
    show(facts, as_json)
    if reason is not None:
        raise DoesNotFitError(reason)


def _folder(model: str) -> str:
    """Return the folder of a config.json that is named itself."""
    path = Path(model)
    return str(path.parent) if path.name == "config.json" and path.is_file() else model


def too_large(
    model: str,
    config: "PreTrainedConfig",
    dtype: str,
    quantize: str | None,
    context: int,
    batch: int,
    where: dict[str, Any],
    *,
    predicts: bool = False,
) -> str | None:
    """Return why a model and its cache do not fit here; None if they do, or if that is unknown."""
    if dtype not in DTYPES or quantize not in (None, *QUANTISED):
        return None
    tensors = _files(model, where)[1]
    return _plan(config, dtype, quantize, context, batch, (), tensors, predicts=predicts)[1]


def _plan(
    config: "PreTrainedConfig",
    dtype: str,
    quantize: str | None,
    context: int,
    batch: int,
    memory: tuple[str, ...],
    tensors: "Tensors | None",
    *,
    predicts: bool = False,
) -> tuple[dict[str, Any], str | None]:
    """Return the facts, and the reason if the model does not fit."""
    import torch

    from quintet.modeling.placement import layout, named_dtype
    from quintet.planning.caches import draft_bytes

    computed = config.torch_dtype or torch.bfloat16 if dtype == "auto" else named_dtype(dtype)
    capacity = _capacity(memory)
    device = next(iter(capacity))
    stored = quantize or _stored(config, device, assumed=bool(memory), tensors=tensors)
    size = _size(config, computed, stored, tensors, device)
    per_draft = draft_bytes(config, computed.itemsize) if predicts else 0
    drafts = batch * context * per_draft
    cache = size.cache_bytes(batch, context, computed.itemsize) + drafts
    working = size.working_bytes(batch, min(PROMPT, context), computed.itemsize)
    working += batch * config.vocab_size * 4

    def named(device: torch.device) -> str:
        # Memory that was only named may be any device's.
        return f"device {device.index}" if memory else str(device)

    needed = size.weight_bytes + cache + working
    kind = stored or str(computed).removeprefix("torch.")
    facts: dict[str, Any] = {
        "family": config.model_type,
        "parameters": size.parameters,
        "active": size.active,
        "weights": Fact(f"{size_of(size.weight_bytes)} in {kind}", size.weight_bytes),
        "held as": Fact(None, kind),
        "cache": Fact(f"{size_of(cache)} for {batch} x {context:,} tokens", cache),
        **({"drafts": Fact(f"{size_of(drafts)} of the cache", drafts)} if predicts else {}),
        "context": Fact(None, context),
        "rows": Fact(None, batch),
        "working": Fact(f"{size_of(working)}, about", working),
        "needed": Fact(size_of(needed), needed),
        "memory": {named(device): Fact(size_of(room), room) for device, room in capacity.items()},
    }
    loaded = _with_cache(size, config, cache)
    room = {device: max(limit - working, 0) for device, limit in capacity.items()}
    try:
        placed = layout(loaded, room, "auto")
    except DoesNotFitError:
        facts["fits"] = False
        total = sum(room.values())
        least = _size(config, computed, "int4").weight_bytes + cache + working
        instead = _instead(config, computed, quantize, total, cache)
        advice = (
            f"it would with --quantize {instead}"
            if instead
            else f"the least that is needed is {size_of(least)}, with --quantize int4"
        )
        facts |= {"instead": Fact(advice, instead), "least": Fact(None, least)}
        available = size_of(sum(capacity.values()))
        return facts, f"{size_of(needed)} needed, and there are {available}; {advice}"
    facts["fits"] = True
    facts["layout"] = {
        named(device): _devices_share(loaded, [p for p in placed if placed[p] == device])
        for device in capacity
        if device in placed.values()
    }
    remaining = sum(room.values()) - size.weight_bytes
    per_token = size.cache_bytes(batch, 1, computed.itemsize) - size.cache_bytes(
        batch, 0, computed.itemsize
    )
    per_token += batch * per_draft
    if per_token:
        most = min(config.max_position_embeddings, remaining // per_token)
        facts["longest context"] = most
    return facts, None


def _stored(
    config: "PreTrainedConfig", device: "torch.device", assumed: bool, tensors: "Tensors | None"
) -> str | None:
    """Return the format in which a device keeps a quantised model, or None for plain numbers.

    Of a device that is only `assumed`, the best is.
    """
    from quintet.quantization.config import FineGrainedFP8Config
    from quintet.quantization.formats import FP8Format
    from quintet.quantization.request import read, resolve_quantization

    settings = vars(config).get("quantization_config")
    if not settings or (tensors is None and read(settings).scheme() is None):
        return None
    if assumed and isinstance(read(settings), FineGrainedFP8Config):
        return "fp8"
    request, scheme = resolve_quantization(settings, None, None, device), read(settings).scheme()
    plain = scheme is not None and isinstance(scheme.weights, FP8Format) and not request.keeps_fp8
    return None if request.target is None or plain else AS_STORED


def _size(
    config: "PreTrainedConfig",
    dtype: "torch.dtype",
    stored: str | None,
    tensors: "Tensors | None" = None,
    device: "torch.device | None" = None,
) -> "Size":
    """Measure a model held in one of QUANTISED, as its files are (HELD), or as plain numbers."""
    from quintet.auto import family
    from quintet.modeling.init_on_meta import init_on_meta
    from quintet.modeling.key_mapping import map_keys
    from quintet.modeling.sizes import measure
    from quintet.quantization.request import SHORT, read, resolve_quantization

    model = init_on_meta(family(config.model_type).find("ForCausalLM"), config)
    if stored is None:
        return measure(model, dtype)
    settings = vars(config).get("quantization_config")
    if stored == AS_STORED and tensors is not None and device is not None:
        mapping = map_keys(model, tensors, stored_as=read(settings))
        request = resolve_quantization(settings, None, None, device)
        return measure(model, dtype, request.scheme(mapping.formats))
    wish = read(settings) if stored == AS_STORED else SHORT[stored]
    return measure(model, dtype, None if wish is None else wish.scheme())


def _with_cache(size: "Size", config: "PreTrainedConfig", cache: int) -> "list[ModelPart]":
    """Add to each layer its share of the cache, which lies with it."""
    from quintet.modeling.placement import ModelPart

    layers = [p.path for p in size.parts if re.search(r"layers\.\d+$", p.path)]
    layers = layers[: config.num_hidden_layers]
    per_layer = cache // max(len(layers), 1)
    return [
        ModelPart(p.path, p.nbytes + (per_layer if p.path in layers else 0)) for p in size.parts
    ]


def _devices_share(loaded: "list[ModelPart]", paths: list[str]) -> Fact:
    nbytes = sum(part.nbytes for part in loaded if part.path in paths)
    layers = [int(path.rpartition(".")[2]) for path in paths if re.search(r"\.\d+$", path)]
    names = [path.rpartition(".")[2] for path in paths if not re.search(r"\.\d+$", path)]
    spread = f"layers {min(layers)} to {max(layers)}" if layers else ""
    return Fact(
        f"{size_of(nbytes)}: {', '.join(filter(None, [spread, *names]))}",
        {"bytes": nbytes, "layers": [min(layers), max(layers)] if layers else [], "others": names},
    )


def _instead(
    config: "PreTrainedConfig", dtype: "torch.dtype", quantize: str | None, room: int, cache: int
) -> str | None:
    """Name the least rounding at which the model fits."""
    tried = (None, *QUANTISED).index(quantize) if quantize in QUANTISED else 0
    for wish in ("int8", "int4")[min(tried, 2) :]:
        if _size(config, dtype, wish).weight_bytes + cache <= room:
            return wish
    return None


def _capacity(memory: tuple[str, ...]) -> "dict[torch.device, int]":
    import torch

    from quintet.checkpoint import parse_size
    from quintet.ops.device_memory import free_memory

    if not memory:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.device("cuda", index) for index in range(gpus)] or [torch.device("cpu")]
        return {device: free_memory(device) for device in devices}
    sizes = []
    for text in memory:
        count, _, size = text.rpartition("x")
        if count and not re.fullmatch(r"[1-9]\d{0,3}", count):
            raise InputError(f"--memory {text!r} has to be a size such as 24GB, or 8x80GB")
        sizes += [parse_size(size)] * int(count or 1)
    return {torch.device("cuda", index): size for index, size in enumerate(sizes)}


def _files(model: str, where: dict[str, Any]) -> "tuple[dict[str, Any], Tensors | None]":
    """Describe the files, and whether they are here already; then also return their tensors."""
    from quintet.checkpoint.remote import read_headers
    from quintet.errors import CheckpointError

    try:
        headers = read_headers(model, **where)
    except (CheckpointError, OfflineError) as error:
        reason = str(error).splitlines()[0].rpartition("; ")[0] or str(error)
        return {"files": Fact(f"no weights seen ({reason})", None)}, None
    state = "here" if headers.local else "to fetch"
    files = Fact(
        f"{size_of(headers.total_bytes)} in {headers.files} file(s), {state}",
        {"bytes": headers.total_bytes, "count": headers.files, "here": headers.local},
    )
    return {"files": files}, headers.tensors
