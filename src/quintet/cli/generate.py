"""`quintet generate`: continue a text, shown as it is made."""

import time
from typing import Any

import click

from quintet.cli.options import (
    choose,
    model_options,
    note,
    open_model,
    read_stdin,
    sampling_options,
    warnings_as_notes,
)
from quintet.errors import InputError, QuintetError
from quintet.hub import demo_model

__all__ = ["command"]


@click.command("generate")
@click.argument("prompt", required=False)
@click.option("--model", "-m", help="Directory or hub id.  [default: the packaged demo model]")
@click.option("--echo/--no-echo", default=True, help="Print the prompt before its continuation.")
@sampling_options
@model_options
def command(
    prompt: str | None,
    model: str | None,
    echo: bool,
    seed: int | None,
    quiet: bool,
    temperature: float | None,
    max_new_tokens: int | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    **where: Any,
) -> None:
    """Continue PROMPT, or what is piped in, and print the text as it is made.

    Without --model, a tiny model that comes with the package writes something like Python.
    """
    text = read_stdin() if prompt in (None, "-") else prompt
    if not text:
        raise InputError(
            'the prompt is empty; try: quintet generate "def fibonacci(n):", or pipe a text in'
        )
    from quintet.generation.streamers import TextStreamer

    with warnings_as_notes(quiet):
        opened = open_model(str(demo_model()) if model is None else model, **where)
        options, generator, seed = choose(
            opened.model.device,
            seed,
            temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        inputs = opened.tokenizer(text, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        config = opened.model.generation_config.replace(**options)
        if max_new_tokens is None and config.max_new_tokens is None and config.max_length is None:
            room = opened.model.config.max_position_embeddings - length
            max_new_tokens = max(1, min(256, room))
        how = f"sampling with seed {seed}" if config.do_sample else "greedy"
        note(f"{opened.describe()}; {how}", quiet)

        streamer = TextStreamer(opened.tokenizer, skip_prompt=not echo, skip_special_tokens=True)
        started = time.perf_counter()
        try:
            output = opened.generator_model.generate(
                inputs,
                config,
                streamer=streamer,
                tokenizer=opened.tokenizer,
                token_healing=echo,
                generator=generator,
                max_new_tokens=max_new_tokens,
            )
        except (KeyboardInterrupt, QuintetError):
            # Ends the line of what has been shown.
            streamer.end()
            raise
        seconds = time.perf_counter() - started
    made = output.shape[1] - length
    note(f"{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s", quiet)
