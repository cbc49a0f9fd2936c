"""The options of `quintet serve`: access, load, and the bounds of a request."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quintet.cli.settings import COUNT, COUNT_OR_NONE
from quintet.errors import InputError, shown

if TYPE_CHECKING:
    from quintet.server.settings import Settings
    from quintet.serving import Limits

Command = TypeVar("Command", bound=Callable[..., Any])
# Fields of Limits and of Settings, which are options of the same name, or of the one here.
ENGINE = (
    *("rows", "capacity", "queue", "piece", "itl_target_ms", "memory", "ahead", "patience"),
    "kept",
)
SERVER = (
    *("host", "port", "insecure_no_auth", "allowed_hosts", "allowed_origins", "page", "docs"),
    *("strict", "speculate"),
)


class _Size(click.ParamType[int]):
    """A number of bytes, as 8MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        from quintet.checkpoint import parse_size

        if isinstance(value, int):
            return value
        if value == "0":
            # Of what is kept; others say what their least is.
            return 0
        try:
            return parse_size(value)
        except InputError:
            self.fail(f"{shown(value)} is no size such as 500MB or 8MiB", param, ctx)


SIZE = _Size()
SECONDS = click.FloatRange(0, min_open=True)
# What bounds a request: the field of Settings, its kind, how it is shown, what it is.
BOUNDS: tuple[tuple[str, str, click.ParamType[Any], str, str], ...] = (
    ("--max-requests", "requests", COUNT, "512", "At once, whatever they are at."),
    ("--max-body", "body", SIZE, "8MiB", "Of a request."),
    ("--max-header", "header", SIZE, "64KiB", "Of the head of a request."),
    ("--max-depth", "depth", COUNT, "64", "To which JSON may nest."),
    ("--head-time", "head_time", SECONDS, "10", "Seconds for the head of a request."),
    ("--body-time", "body_time", SECONDS, "60", "Seconds for its body."),
    ("--deadline", "deadline", SECONDS, "600", "Seconds for an answer."),
    ("--keep-alive", "keep_alive", SECONDS, "5", "Seconds a connection waits for a next request."),
    ("--drain", "drain", click.FloatRange(0), "30", "Seconds for what is under way at the end."),
    ("--ping", "ping", SECONDS, "15", "Silent seconds until a stream shows that it lives."),
    ("--max-buffer", "buffer", SIZE, "256KiB", "Of a stream that waits for a slow reader."),
    ("--stall", "stall", SECONDS, "30", "Seconds for which a reader may take nothing."),
    ("--max-step", "step", SECONDS, "300", "Seconds a step may take; then the server ends by 1."),
    ("--max-messages", "messages", COUNT, "2048", "Of a conversation."),
    ("--max-answer", "answer", COUNT, "4096", "Tokens, where a request does not say."),
    ("--max-choices", "choices", COUNT, "16", "Answers to a request (n)."),
    ("--max-prompts", "prompts", COUNT, "128", "Of a request."),
    ("--max-stops", "stops", COUNT_OR_NONE, "16", "Texts that end an answer."),
    ("--max-stop-length", "stop_length", COUNT, "256", "Characters of each."),
    ("--max-top-logprobs", "top_logprobs", COUNT_OR_NONE, "20", "Beside each token."),
    ("--max-scores", "scores", COUNT, "1048576", "Of tokens, kept until answers are whole."),
    ("--max-biases", "biases", COUNT_OR_NONE, "300", "Tokens in a logit_bias."),
    ("--max-tools", "tools", COUNT_OR_NONE, "128", "Of a request."),
    ("--max-schema", "schema", SIZE, "64KiB", "Of JSON that an answer is to follow."),
)


def engine_options(command: Command) -> Command:
    """Add the options that limit concurrent work."""
    for option in (
        click.option(
            "--kept",
            type=SIZE,
            default="1GiB",
            show_default=True,
            help="For what was read before, to be gone on from.",
        ),
        click.option(
            "--patience",
            type=click.FloatRange(0),
            default=2.0,
            show_default=True,
            help="Seconds without a row until another, who has several, gives one back.",
        ),
        click.option(
            "--ahead",
            type=COUNT,
            default=256,
            show_default=True,
            help="Tokens of an answer there has to be memory for when it begins.",
        ),
        click.option("--memory", type=SIZE, help="For rows under way.  [default: all they can]"),
        click.option(
            "--piece",
            type=COUNT,
            default=512,
            show_default=True,
            help="Tokens of prompts read between two steps of the others, at the most.",
        ),
        click.option(
            "--itl-target-ms",
            type=click.FloatRange(min=0, min_open=True),
            default=200.0,
            show_default=True,
            help="Milliseconds between two tokens of the others meanwhile.",
        ),
        click.option(
            "--queue",
            type=COUNT_OR_NONE,
            default=64,
            show_default=True,
            help="Requests that may wait.",
        ),
        click.option(
            "--capacity",
            "--context",
            type=COUNT,
            help="Tokens of a row, prompt and answer.  [default: at most 4096]",
        ),
        click.option(
            "--rows",
            type=COUNT,
            help="Texts generated at once.  [default: 8; on a GPU what fits, at most 64]",
        ),
        click.option(
            "--cache-dtype",
            type=click.Choice(["int8", "int6", "int4"]),
            help="Hold keys and values in fewer bits.",
        ),
        click.option(
            "--tool-calls",
            type=click.Choice(["template", "coder"]),
            default="template",
            show_default=True,
            help="How calls of tools are told from text: as the chat template writes them, or "
            "also as Qwen2.5-Coder does, which writes <tools> or bare JSON.",
        ),
        click.option(
            "--speculate",
            type=click.Choice(["off", "mtp", "lookup"]),
            default="off",
            show_default=True,
            help="Guess ahead where a request does not say: with "
            "prediction layers, or from what was read.",
        ),
    ):
        command = option(command)
    return command


def server_options(command: Command) -> Command:
    """Add the options of access, and of the bounds of a request."""
    for flag, field, kind, default, text in reversed(BOUNDS):
        command = click.option(
            flag, field, type=kind, default=default, show_default=True, help=text
        )(command)
    for option in (
        click.option(
            "--log-format",
            type=click.Choice(["auto", "text", "json"]),
            default="auto",
            show_default=True,
            help="auto: text at a terminal, lines of JSON otherwise.",
        ),
        click.option(
            "--strict",
            is_flag=True,
            help="Refuse fields that are not known, instead of naming them.",
        ),
        click.option("--docs/--no-docs", default=True, help="Describe it at /openapi.json."),
        click.option("--page/--no-page", default=True, help="Have a page to chat on."),
        click.option(
            "--allowed-origin",
            "allowed_origins",
            multiple=True,
            metavar="ORIGIN",
            help="Of other pages that may ask, as https://name; * for all.",
        ),
        click.option(
            "--allowed-host",
            "allowed_hosts",
            multiple=True,
            metavar="NAME",
            help="A name it may be asked by, besides addresses; * for all.",
        ),
        click.option(
            "--insecure-no-auth",
            is_flag=True,
            help="Answer everybody on the network, without a key.",
        ),
        click.option(
            "--api-key-file",
            type=click.Path(dir_okay=False),
            help="Keys, one a line; or one in QUINTET_API_KEY.",
        ),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=8000,
            show_default=True,
            help="0 for any that is free.",
        ),
        click.option(
            "--host", default="127.0.0.1", show_default=True, help="The address to listen at."
        ),
    ):
        command = option(command)
    return command


def settings_of(given: dict[str, Any], keys: tuple[str, ...]) -> "Settings":
    """Take the server's settings out of a command's options.

    Raises:
        InputError: one breaks a rule, or everybody would be answered by mistake.
    """
    from quintet.server.settings import Settings

    names = (*SERVER, *(field for _, field, *_ in BOUNDS))
    settings = Settings(keys=keys, **{name: given.pop(name) for name in names})
    settings.check_address()
    return settings


def limits_of(given: dict[str, Any], context: int) -> "Limits":
    """Return the limits of an engine whose model has a context of this many tokens.

    Raises:
        InputError: one breaks a rule.
    """
    from quintet.serving import Limits

    wanted = {name: given[name] for name in ENGINE}
    wanted["rows"] = wanted["rows"] or Limits().rows
    wanted["capacity"] = wanted["capacity"] or min(Limits().capacity, context)
    return Limits(**wanted)
