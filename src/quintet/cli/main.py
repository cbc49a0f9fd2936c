"""`quintet`: finds the command, and turns errors into one screen and an exit code."""

import difflib
import importlib
import io
import os
import shlex
import sys
from types import MappingProxyType
from typing import Any

import click

from quintet import __version__
from quintet.cli.terminal import complain
from quintet.errors import InputError, QuintetError, SaveError

COMMANDS = MappingProxyType(
    {
        "bench": "Measure how fast a model runs here.",
        "chat": "Talk with a model.",
        "convert": "Write a model's weights in another dtype or other shards.",
        "generate": "Continue a text.",
        "info": "Say what a model is.",
        "ls": "List the models on this machine.",
        "plan": "Say whether a model fits, before it is fetched.",
        "quantize": "Write a model's weights in fewer bits.",
        "rm": "Remove models from the hub cache.",
        "serve": "Answer over HTTP, as OpenAI's clients ask.",
        "train": "Train a model, or go on with one.",
        "verify": "Check that a model's files are whole.",
    }
)


# What other programs call them.
ALIASES = MappingProxyType(
    {
        "run": "chat",
        "gen": "generate",
        "list": "ls",
        "show": "info",
        "remove": "rm",
        "server": "serve",
        "api": "serve",
        "finetune": "train",
        "pretrain": "train",
    }
)
FETCHED = "a model is fetched when it is first used, as by `quintet chat OWNER/NAME`"
ADVICE = MappingProxyType(
    {
        "pull": f"There is none: {FETCHED}",
        "download": f"There is none: {FETCHED}",
        "fetch": f"There is none: {FETCHED}",
        "login": "The hub has a command of its own for that: `hf auth login`",
    }
)


class _Commands(click.Group):
    """Imports a command's module when the command runs, not for the list of commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"quintet.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in ALIASES:
            return super().resolve_command(ctx, [ALIASES[name], *args[1:]])
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}. {_instead(name)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output has enough, as in `| head`; closing stdout at exit would
            # complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except QuintetError:
            raise
        except OSError as error:
            # What fails at a file of its own names it; without a name it is our output.
            if error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SaveError(f"could not write the output: {error.strerror}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _instead(name: str) -> str:
    if name in ADVICE:
        return f"{ADVICE[name]}."
    if "/" in name or os.path.exists(name):
        return f"To talk with a model: quintet chat {shlex.quote(name)}"
    near = [known for known in COMMANDS if known.startswith(name)]
    near += difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(COMMANDS)}."


def _spelt_with_dashes(name: str) -> str:
    return name.replace("_", "-")


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # People know options from Python, where they have underscores.
        "token_normalize_func": _spelt_with_dashes,
    },
)
@click.version_option(__version__, message="quintet %(version)s")
def cli() -> None:
    """Run open language models: DeepSeek-V2 and V3, Qwen2, Qwen2-MoE and Zamba2."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; docs/errors.md lists the codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model writes any character there is, also at a terminal that knows fewer.
        sys.stdout.reconfigure(errors="replace")
    try:
        _check_directory()
        code: Any = cli.main(arguments, prog_name="quintet", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = 130
        _leave_together()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except QuintetError as error:
        if os.environ.get("QUINTET_DEBUG"):
            raise
        _complain_of(error)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _complain_of(error: QuintetError) -> None:
    """Print an error; of several processes the first prints, once, and the others are told."""
    message: str | None = str(error)
    if "WORLD_SIZE" in os.environ:
        from quintet.cli.together import last_words

        message = last_words(error)
    if message is not None:
        complain(f"error: {message}")


def _leave_together() -> None:
    """Report to the other processes, if any, that Ctrl-C ends this one."""
    if "WORLD_SIZE" in os.environ:
        from quintet.cli.together import interrupted

        interrupted()


def _check_directory() -> None:
    """Refuse to start where no file can be found; a library would end the process in its way."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError(
            "the working directory no longer exists; change to one that does"
        ) from None
