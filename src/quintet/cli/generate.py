"""`quintet generate`: continue a text, shown as it is made, or many from a file."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.options import (
    Opened,
    check_options,
    choose,
    model_options,
    open_model,
    read_stdin,
    sampling_options,
    warnings_as_notes,
    with_default_length,
)
from quintet.cli.results import (
    counted,
    cut,
    draft_counts,
    draft_summary,
    finish_reason,
    speculation_of,
)
from quintet.cli.servers import is_address, key_for, key_option
from quintet.cli.settings import COUNT, SETTING, applied, describe, parse
from quintet.cli.shaping import AnswerShape, shape_options
from quintet.cli.terminal import Waiting, harmless, note, unechoed
from quintet.errors import InputError
from quintet.hub import demo_model

if TYPE_CHECKING:
    import torch

    from quintet.cli.remote import Remote
    from quintet.generation.config import GenerationConfig


@click.command("generate")
@click.argument("prompt", required=False)
@click.argument("words", nargs=-1, metavar="[NAME=VALUE]...")
@click.option(
    "--model",
    "-m",
    help="Directory, hub id, or address of a server.  [default: the packaged demo model]",
)
@click.option("--file", "-f", "file", type=click.Path(), help="Read the prompt from a file.")
@click.option(
    "--batch",
    type=click.Path(),
    help="Continue every line of a file of JSON Lines, - for standard input: a text each, or an "
    "object with prompt or messages and options of generate(). Prints a line of JSON for each, in "
    "their order, with what else its object holds.",
)
@click.option("--batch-size", type=COUNT, default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, at the end.")
@click.option("--echo/--no-echo", default=True, help="Print the prompt before its continuation.")
@sampling_options
@shape_options
@model_options
@key_option
@click.pass_context
def command(
    context: click.Context,
    /,
    prompt: str | None,
    words: tuple[str, ...],
    model: str | None,
    file: str | None,
    batch: str | None,
    batch_size: int,
    as_json: bool,
    echo: bool,
    api_key_file: str | None,
    seed: int | None,
    quiet: bool,
    sampling: dict[str, Any],
    shape: AnswerShape,
    **where: Any,
) -> None:
    """Continue PROMPT, or what is piped in, and print the text as it is made.

    NAME=VALUE sets any option of generate(). Without --model, a tiny model that comes with the
    package writes something like Python.
    """
    from quintet.cli.together import begin, from_first

    begin()
    for word in words:
        if not SETTING.match(word):
            raise InputError(
                f"{word!r} is a second prompt; put a prompt of several words in quotes"
            )
    _check_alone(context, batch is not None, as_json)
    given = {"PROMPT": prompt, "--file": file, "--batch": batch}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are two prompts; give one of them")
    if shape and batch is not None:
        raise InputError("--batch has no --json-schema or --regex; continue the texts one by one")
    read: Callable[[], str] = partial(_prompt, prompt, file)
    if batch is not None:
        read = _piped if batch == "-" else partial(_read, batch)
    text = from_first(read)
    lines = None if batch is None else text.splitlines()

    if model is not None and is_address(model):
        from quintet.cli.remote import Remote

        key = key_for(model, api_key_file, context)
        remote = Remote(model, key, {**sampling, **shape.fields, "seed": seed, **parse(words)})
        _continue_there(remote, text, echo, as_json, quiet)
        return
    if api_key_file is not None:
        raise InputError("--api-key-file is the key of a server; --model is no address of one")
    check_options(sampling, words)
    with warnings_as_notes(quiet):
        opened = open_model(str(demo_model()) if model is None else model, quiet=quiet, **where)
        options, generator, seed = choose(
            opened.model.device,
            seed,
            sampling,
            words,
        )
        config = applied(opened.model.generation_config, options)
        note(f"{opened.describe()}; {describe(config, seed)}", quiet)
        if lines is not None:
            from quintet.cli.batch import run

            run(opened, config, lines, seed=seed, batch_size=batch_size, quiet=quiet)
        else:
            _continue(opened, config, text, generator, seed, shape, echo, as_json, quiet)


def _check_alone(context: click.Context, batch: bool, as_json: bool) -> None:
    """Refuse options that mean nothing beside others; whoever gave them expects something."""
    for name, flag, holds, why in (
        ("batch_size", "--batch-size", batch, "it is how many lines of --batch run at once"),
        ("as_json", "--json", not batch, "--batch prints a line of JSON for each prompt anyway"),
        ("echo", "--echo", not batch and not as_json, "JSON has the prompt and the text apart"),
    ):
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and not holds:
            raise InputError(f"{flag} has no effect here: {why}")


def _continue(
    opened: Opened,
    config: "GenerationConfig",
    text: str,
    generator: "torch.Generator",
    seed: int,
    shape: AnswerShape,
    echo: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from quintet.cli.streaming import Continuation

    tokenizer = opened.tokenizer
    processors = shape.maker(opened)(text)
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    config = with_default_length(opened, config, length)
    waiting = Waiting("generating" if as_json else f"reading {counted(length)}", quiet)
    streamer = None if as_json else Continuation(tokenizer, echo, waiting)
    started = time.perf_counter()
    with unechoed(), waiting:
        output = opened.generator_model.generate(
            inputs,
            config,
            streamer=streamer,
            tokenizer=tokenizer,
            logits_processor=processors,
            # Healing changes the end of the prompt, which then has to be shown, and is of no form.
            token_healing=echo and not as_json and not shape,
            generator=generator,
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - started
    ids = output.sequences[0, length:]
    speculation = speculation_of(output)
    if as_json:
        result = {
            "prompt": text,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": finish_reason(config, ids),
            "prompt_tokens": length,
            "new_tokens": ids.numel(),
            "seconds": round(seconds, 4),
            "seed": seed if config.do_sample else None,
            "model": opened.name,
        }
        if speculation is not None:
            result |= draft_counts(*speculation.of_row(0))
        click.echo(json.dumps(result, ensure_ascii=False))
    speed = f"{counted(ids.numel())} in {seconds:.2f} s, {ids.numel() / seconds:.1f} tokens/s"
    note(f"{speed}{draft_summary(speculation)}", quiet)
    ended = cut(config, ids, opened.model.config.max_position_embeddings - length)
    if ended is not None:
        note(ended, quiet)
    if tokenizer.chat_template:
        name = shlex.quote(opened.name)
        note(f'a text was continued; to ask this model: quintet chat {name} "QUESTION"', quiet)


def _continue_there(remote: "Remote", text: str, echo: bool, as_json: bool, quiet: bool) -> None:
    """Have a server continue a text."""
    pieces: list[str] = []
    shown = harmless if sys.stdout.isatty() else str
    waiting = Waiting("waiting for the server", quiet)

    def write(piece: str) -> None:
        waiting.stop()
        pieces.append(piece)
        if not as_json:
            click.echo(shown(piece), nl=False)

    note(remote.describe(), quiet)
    if echo and not as_json:
        click.echo(text, nl=False)
    started = time.perf_counter()
    with unechoed(), waiting:
        ended, usage = remote.complete(text, write)
    warning = remote.news()
    if warning is not None:
        note(warning, quiet)
    seconds = time.perf_counter() - started
    tokens = usage.get("completion_tokens") or len(pieces)
    if as_json:
        result = {
            "prompt": text,
            "text": "".join(pieces),
            "finish_reason": ended,
            "prompt_tokens": usage.get("prompt_tokens"),
            "new_tokens": tokens,
            "seconds": round(seconds, 4),
            "model": remote.name,
        }
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo()
    note(f"{counted(tokens)} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", quiet)
    if ended == "length":
        note(f"cut at {counted(tokens)}; -n sets more", quiet)


def _read(file: str) -> str:
    from quintet.cli.texts import text_of_file

    return text_of_file(file)


def _prompt(prompt: str | None, file: str | None) -> str:
    if file is not None:
        text: str | None = _without_line_end(_piped() if file == "-" else _read(file))
    elif prompt in (None, "-"):
        text = _without_line_end(read_stdin())
    else:
        text = prompt
    if not text:
        raise InputError(
            'the prompt is empty; try: quintet generate "def fibonacci(n):", or pipe a text in'
        )
    return text


def _without_line_end(text: str | None) -> str | None:
    """Return a text without the line end that `echo` and editors put behind the last line."""
    return None if text is None else text.removesuffix("\n").removesuffix("\r")


def _piped() -> str:
    if (text := read_stdin()) is None:
        raise InputError("nothing is piped in; name a file, or pipe one into standard input")
    return text
