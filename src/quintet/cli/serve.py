"""`quintet serve`: models over HTTP, as OpenAI's clients ask for them."""

import importlib.util
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from quintet.cli.options import open_model, warnings_as_notes, weight_options
from quintet.cli.serve_options import engine_options, limits_of, server_options, settings_of
from quintet.cli.servers import keys_in
from quintet.cli.terminal import note
from quintet.cli.together import begin, several, speak, wait_for_first
from quintet.errors import (
    DoesNotFitError,
    InputError,
    MissingDependencyError,
    QuintetError,
    shown,
)

if TYPE_CHECKING:
    from quintet.cli.options import Opened
    from quintet.generation.requests import Served
    from quintet.server.logs import LogFormat
    from quintet.server.registry import Loaded, Offer
    from quintet.serving import Limits
    from quintet.serving.options import Speculation

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
BITS = {"int8": 8, "int6": 6, "int4": 4}
# Of a model or adapter, as requests write it.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
OF_MODEL = ("dtype", "device", "attn_implementation", "threads", "quantize", "tp", "ep", "pp")
WHERE = ("revision", "cache_dir", "local_files_only")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to be served.

    Attributes:
        name: what requests call it.
        path: a directory, hub id, or another name that models are opened by.
        adapters: paths of adapters, by the names that requests call them.
    """

    name: str
    path: str
    adapters: dict[str, str]


@click.command("serve")
@click.argument("model", required=False)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    help="A model, and what requests call it; may be repeated.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="An adapter, of PEFT or in GGUF, that requests may name as their model; of several "
    "models' one, MODEL:NAME=PATH.",
)
@engine_options
@server_options
@weight_options
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str | None,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    api_key_file: str | None,
    cache_dtype: str | None,
    log_format: str,
    quiet: bool,
    **given: Any,
) -> None:
    """Answer over HTTP with MODEL: /v1/chat/completions and others, as OpenAI's clients ask.

    It answers this machine only, unless told an address and given a key. Every option can be set
    in the environment, as QUINTET_PORT. SIGTERM lets what is under way finish.
    """
    begin()
    if model and context.get_parameter_source("models") is ParameterSource.ENVIRONMENT:
        models = ()
    wanted = _wanted([*([model] if model else []), *models], adapters)
    _check_installed()
    if several() and len(wanted) > 1:
        raise InputError(
            "several processes hold one model; serve each model by processes of its own"
        )
    settings = settings_of(given, _keys(api_key_file))
    from quintet.cli.serve_banner import announcement
    from quintet.server.logs import logged, set_up
    from quintet.server.process import listen, serve
    from quintet.server.registry import ModelRegistry
    from quintet.server.service import Service

    bits = None if cache_dtype is None else BITS[cache_dtype]
    opening = partial(
        _load,
        given=given,
        bits=bits,
        speculate=settings.speculate,
        quiet=quiet,
    )
    from quintet.cli.share import own_group

    group, leads = own_group(wanted[0].path, given, {name: given[name] for name in WHERE})
    if not leads:
        _follow(wanted[0], given, quiet)
        return
    if group and settings.port:
        # Each group with texts of its own is asked by itself, as if it were a server of its own.
        settings = replace(settings, port=settings.port + group)
    # Before a model is loaded for nothing.
    with listen(settings) as sock:
        with warnings_as_notes(quiet):
            offers, opened = zip(*(_offer(one, opening) for one in wanted), strict=True)
        if group:
            speak()
        service = Service(settings, ModelRegistry(offers))
        lines, facts = announcement(service, sock.getsockname(), opened)
        # Nothing here may hold a model that is unloaded.
        del offers, opened
        if set_up(cast("LogFormat", log_format)):
            logged("serving", facts)
        else:
            note("\n".join(lines), quiet)
        if settings.is_open:
            logged("everybody on the network is answered, without a key", None, logging.WARNING)
        code = serve(service, sock)
    sys.exit(code)


for option in command.params:
    if isinstance(option, click.Option):
        flag = max(option.opts, key=len)
        option.envvar = "QUINTET_" + flag.removeprefix("--").replace("-", "_").upper()


def _wanted(models: Sequence[str], adapters: Sequence[str]) -> list[Wanted]:
    """Return the models to serve, by name.

    Raises:
        InputError: nothing, or a name that is none.
    """
    if not models:
        raise InputError("there is no model to serve; name one: quintet serve OWNER/NAME")
    wanted = []
    for text in models:
        name, path = _split(text)
        if name is None:
            # Where it lies on this machine is nobody's business.
            name = Path(path).resolve().name if Path(path).exists() else path
            name = name if NAME.fullmatch(name) else "model"
        wanted.append(Wanted(name, path, {}))
    known = {one.name: one for one in wanted}
    for text in adapters:
        name, path = _split(text)
        if name is None:
            raise InputError(f"--adapter {shown(text)} has to be NAME=PATH; requests use the name")
        owner, colon, own = name.rpartition(":")
        if not colon and len(wanted) > 1:
            raise InputError(
                f"--adapter {shown(text)} has to say of which model it is, as "
                f"{wanted[0].name}:{name}=PATH"
            )
        wanted_model = known.get(owner) if colon else wanted[0]
        if wanted_model is None or own in wanted_model.adapters:
            raise InputError(f"--adapter {shown(text)} is of no model here, or there is one")
        wanted_model.adapters[own] = path
    return wanted


def _split(text: str) -> tuple[str | None, str]:
    """Split NAME=PATH; a path that is there may have a sign of its own."""
    name, sign, path = text.partition("=")
    if not sign or Path(text).exists():
        return None, text
    if not NAME.fullmatch(name) or not path:
        raise InputError(
            f"{shown(text)} has to be NAME=PATH, with a name of letters, digits and . _ / : -"
        )
    return name, path


def _follow(wanted: Wanted, given: dict[str, Any], quiet: bool) -> None:
    """Run what the engine of the first process runs, until that one is closed; end as it does."""
    from quintet.cli.share import room_together
    from quintet.generation.following import follow

    room_together()
    how = {name: given[name] for name in (*OF_MODEL, *WHERE)}
    model = cast("Any", open_model(wanted.path, quiet=quiet, **how).model)
    end = wait_for_first()
    try:
        follow(model)
    except RuntimeError:
        if end.last_signal is None:
            raise
        sys.exit(128 + end.last_signal)
    if end.last_signal == signal.SIGINT:
        sys.exit(130)


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"quintet serve needs {', '.join(missing)}; install it: pip install 'quintet[serve]'"
        )


def _keys(path: str | None) -> tuple[str, ...]:
    """Return the keys in a file and in the environment.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    from quintet.server.settings import as_keys

    keys = as_keys([os.environ.get("QUINTET_API_KEY", "")])
    return keys if path is None else (*keys, *keys_in(path))


def _offer(wanted: Wanted, opening: Any) -> "tuple[Offer, Opened]":
    from quintet.server.registry import Offer

    loaded, opened = opening(wanted)
    reload = partial(_again, wanted, opening)
    return Offer(wanted.name, reload, tuple(wanted.adapters), loaded), opened


def _again(wanted: Wanted, opening: Any) -> "Loaded":
    loaded: Loaded = opening(wanted)[0]
    return loaded


def _load(
    wanted: Wanted,
    *,
    given: dict[str, Any],
    bits: int | None,
    speculate: "Speculation",
    quiet: bool,
) -> "tuple[Loaded, Opened]":
    """Open a model, and let an engine run it.

    Raises:
        InputError: it cannot guess ahead as it is to.
        DoesNotFitError: model and cache are larger than the memory there is.
        QuintetError: whatever keeps it from loading.
    """
    from quintet.parsing import CODER
    from quintet.server.fingerprint import fingerprint
    from quintet.server.registry import Loaded
    from quintet.serving import Engine

    where = {name: given[name] for name in WHERE}
    how = {name: given[name] for name in OF_MODEL}
    limits = _fitting(wanted, given, bits, where, predicts=speculate == "mtp")
    opened = open_model(wanted.path, quiet=quiet, **how, **where)
    for name, path in wanted.adapters.items():
        places = {key: where[key] for key in ("local_files_only", "cache_dir")}
        opened.model.load_adapter(path, name, **places)
    if wanted.adapters:
        # Of itself the model answers as it is.
        opened.model.set_adapter([])
    # Where memory is short, and where it is taken at once, is found how much a row takes.
    bounded = given["memory"] is not None or opened.model.device.type != "cpu"
    if bounded and opened.model.world is None:
        limits = _measured(cast("Any", opened.model), limits, given, bits, speculate)
    engine = Engine(
        cast("Any", opened.model), opened.tokenizer, limits, nbits=bits, speculate=speculate
    )
    print_of = fingerprint(opened.model, bits)
    calls = CODER if given["tool_calls"] == "coder" else None
    return Loaded(engine, opened.tokenizer, limits.capacity, print_of, calls), opened


def _fitting(
    wanted: Wanted,
    given: dict[str, Any],
    bits: int | None,
    where: dict[str, Any],
    *,
    predicts: bool,
) -> "Limits":
    """Return the engine's limits, when model and rows fit into the memory there is."""
    from quintet.auto import AutoConfig
    from quintet.cli.plan import DTYPES, QUANTISED, too_large
    from quintet.cli.share import too_large_together
    from quintet.modeling.placement import first_device

    config = None
    with suppress(QuintetError):
        # What is wrong with it is said by what loads it.
        config = AutoConfig.from_pretrained(wanted.path, **where)
    if config is None:
        return limits_of(given, 4096)
    limits = limits_of(given, config.max_position_embeddings)
    # In fewer bits the cache of as many rows is that of fewer.
    rows = max(1, limits.rows * (bits or 16) // 16)
    if given["rows"] is None and first_device(given["device"]).type != "cpu":
        # How many there are is found when the model is there.
        rows = 1
    # That a model has no such layers is said by its engine.
    predicts = predicts and bool(vars(config).get("num_nextn_predict_layers"))
    known = given["dtype"] in DTYPES and given["quantize"] in (None, *QUANTISED)
    if several():
        reason = (
            too_large_together(config, given, limits, bits, predicts=predicts) if known else None
        )
    else:
        reason = too_large(
            wanted.path,
            config,
            given["dtype"],
            given["quantize"],
            limits.capacity,
            rows,
            where,
            predicts=predicts,
        )
    if reason is not None:
        raise DoesNotFitError(
            f"{wanted.name} with {limits.rows} rows of {limits.capacity:,} tokens: {reason}; or "
            "take fewer --rows, or less --capacity"
        )
    return limits


def _measured(
    model: "Served",
    limits: "Limits",
    given: dict[str, Any],
    bits: int | None,
    speculate: "Speculation",
) -> "Limits":
    """Return limits whose rows there is memory for; a GPU takes it at once, beside the model.

    Raises:
        DoesNotFitError: it has none for one row.
    """
    from quintet.serving.memory import limits_for

    memory, prefix_bytes = given["memory"], limits.kept
    found = limits_for(
        model,
        memory=None if memory is None else memory + prefix_bytes,
        nbits=bits,
        rows=given["rows"],
        capacity=limits.capacity,
        kept=prefix_bytes,
        speculate=speculate,
    )
    return replace(limits, rows=found.rows, memory=found.memory)
