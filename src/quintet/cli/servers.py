"""Servers on the command line: their addresses and their keys."""

import os
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from quintet.errors import CheckpointError, InputError, shown
from quintet.files import read_limited

MAX_KEYS = 1_000_000
# Options of commands that are about a model in this process.
OWN = frozenset(
    [
        *("dtype", "quantize", "device", "threads", "attn_implementation", "local_files_only"),
        *("cache_dir", "revision", "adapters", "mtp", "draft", "batch", "batch_size"),
    ]
)


def is_address(name: str | None) -> bool:
    """Return whether a model's name is the address of a server."""
    return name is not None and name.startswith(("http://", "https://"))


def key_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option for the file of a server's key."""
    option = click.option(
        "--api-key-file",
        type=click.Path(),
        help="Of a server: its key.  [env: QUINTET_API_KEY or OPENAI_API_KEY]",
    )
    return option(command)


def key_for(url: str, path: str | None, context: click.Context) -> str | None:
    """Return the key for a server, of a file or of the environment; None for none.

    Raises:
        InputError: the file has none, or the command has an option that is for a model here.
    """
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in OWN:
            raise InputError(
                f"{max(parameter.opts, key=len)} is for a model in this process; the one at "
                f"{shown(url)} runs as its server was told"
            )
    if path is not None:
        return keys_in(path)[0]
    return os.environ.get("QUINTET_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def keys_in(path: str) -> tuple[str, ...]:
    """Return the keys in a file, one a line.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    from quintet.server.settings import as_keys

    try:
        found = as_keys(read_limited(Path(path), MAX_KEYS).decode("ascii").splitlines())
    except CheckpointError as error:
        raise InputError(f"cannot read keys from {shown(path)}: {error}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise InputError(f"cannot read keys from {shown(path)}: {why}") from None
    if not found:
        raise InputError(f"there is no key in {shown(path)}; write one a line")
    return found
