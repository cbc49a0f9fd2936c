"""`quintet chat`: talk with a model in the terminal."""

import contextlib
import importlib
import sys
import time
from typing import Any

import click

from quintet.cli.options import (
    Opened,
    choose,
    model_options,
    note,
    open_model,
    sampling_options,
    warnings_as_notes,
)
from quintet.errors import ChatTemplateError, ContextLengthError

__all__ = ["command"]

HELP = """\
/help           this list
/system TEXT    begin again with TEXT as the system message
/reset          forget the conversation
/exit           leave (so does Ctrl-D; Ctrl-C stops an answer)"""


@click.command("chat")
@click.argument("model")
@click.option("--system", help="A system message to begin with.")
@sampling_options
@model_options
def command(
    model: str,
    system: str | None,
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
    """Talk with MODEL, a directory or hub id of a model with a chat template.

    Piped in, each line is a message, and only the answers are printed.
    """
    with warnings_as_notes(quiet):
        opened = open_model(model, **where)
        if not opened.tokenizer.chat_template:
            raise ChatTemplateError(
                f"{model!r} has no chat template: it continues texts and was not trained to "
                "answer; use `quintet generate`, or the chat version of the model"
            )
        options, generator, _ = choose(
            opened.model.device,
            seed,
            temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        config = opened.model.generation_config.replace(**options)
        note(opened.describe(), quiet)
        note("/help lists the commands", quiet or not sys.stdin.isatty())
        talk = _Talk(opened, config, generator, max_new_tokens, system, quiet)
        talk.run()


class _Talk:
    """A conversation: the messages so far and how answers are made."""

    def __init__(
        self,
        opened: Opened,
        config: Any,
        generator: Any,
        max_new_tokens: int | None,
        system: str | None,
        quiet: bool,
    ) -> None:
        self.opened = opened
        self.config = config
        self.generator = generator
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.quiet = quiet
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def run(self) -> None:
        """Read messages and answer them until the input ends."""
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if at_terminal:
            # Line editing and history for input(), where the platform has it.
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")
        while True:
            try:
                text = input("> " if at_terminal else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                click.echo(err=True)
                return
            if text.startswith("/"):
                if not self.obey(text):
                    return
            elif text:
                self.answer(text)

    def obey(self, text: str) -> bool:
        """Carry out a command; False to leave."""
        name, _, rest = text.partition(" ")
        if name == "/exit":
            return False
        if name == "/system":
            self.system = rest.strip() or None
            self.reset()
        elif name == "/reset":
            self.reset()
        elif name == "/help":
            click.echo(HELP, err=True)
        else:
            click.echo(f"There is no command {name}.\n{HELP}", err=True)
        return True

    def answer(self, text: str) -> None:
        """Answer one message, and keep both unless it fails."""
        from quintet.generation.streamers import TextStreamer

        tokenizer, model = self.opened.tokenizer, self.opened.model
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = inputs["input_ids"]
        room = model.config.max_position_embeddings - ids.shape[1]
        streamer = _Recorder(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        started = time.perf_counter()
        try:
            self.opened.generator_model.generate(
                inputs,
                self.config,
                streamer=streamer,
                generator=self.generator,
                max_new_tokens=self.max_new_tokens or max(1, min(1024, room)),
            )
        except ContextLengthError as error:
            if not sys.stdin.isatty():
                raise
            click.echo(f"error: {error}\n/reset forgets the conversation.", err=True)
            return
        except KeyboardInterrupt:
            streamer.end()
        seconds = time.perf_counter() - started
        reply = tokenizer.decode(streamer.tokens, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        used, made = ids.shape[1] + len(streamer.tokens), len(streamer.tokens)
        note(
            f"{made} tokens, {made / seconds:.1f} tokens/s, context {used} of "
            f"{model.config.max_position_embeddings}",
            self.quiet,
        )


class _Recorder:
    """A streamer that also keeps the tokens, so that an interrupted answer is not lost."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Pass tokens on, and keep those after the prompt."""
        if self._prompt_seen:
            self.tokens += value.tolist()
        self._prompt_seen = True
        self.inner.put(value)

    def end(self) -> None:
        """Pass the end on."""
        self.inner.end()
