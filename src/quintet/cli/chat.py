"""`quintet chat`: talk with a model in the terminal."""

import contextlib
import dataclasses
import difflib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.console import Console
from quintet.cli.conversation import Conversation
from quintet.cli.offers import choose_model
from quintet.cli.options import (
    Opened,
    check_options,
    choose,
    kept_system,
    model_options,
    open_model,
    read_stdin,
    sampling_options,
    warnings_as_notes,
    with_default_length,
)
from quintet.cli.results import counted, cut, draft_summary, speculation_of
from quintet.cli.settings import SETTING, applied, describe, drawn, parse, seed_of
from quintet.cli.terminal import Waiting, complain, note, unechoed
from quintet.errors import ChatTemplateError, InputError, QuintetError

if TYPE_CHECKING:
    import torch

    from quintet.cli.answer import Answer, Shown
    from quintet.generation.config import GenerationConfig
    from quintet.generation.outputs import Speculation

__all__ = ["command"]

REASONING = ("fold", "show", "hide")
# Tokens of an answer where nothing says how many.
LONGEST_ANSWER = 1024
# Seconds to the first token that are worth a word.
LONG = 1.0


@click.command("chat")
@click.argument("model", required=False)
@click.argument("words", nargs=-1, metavar="[QUESTION] [NAME=VALUE]...")
@click.option("--system", help="A system message to begin with.")
@click.option("--load", "begun", type=click.Path(), help="Go on with a conversation /save wrote.")
@click.option(
    "--reasoning",
    type=click.Choice(REASONING),
    default="fold",
    show_default=True,
    help="What a model thinks before it answers: how long it took, all of it, or nothing.",
)
@sampling_options
@model_options
def command(
    model: str | None,
    words: tuple[str, ...],
    system: str | None,
    begun: str | None,
    reasoning: "Shown",
    seed: int | None,
    quiet: bool,
    sampling: dict[str, Any],
    **where: Any,
) -> None:
    """Talk with MODEL, a directory or hub id of a model with a chat template.

    Without MODEL, ask which of those on this machine. With a QUESTION, answer it and leave; - is
    all that is piped in. NAME=VALUE sets any option of generate(), such as temperature=0.7. Without
    a QUESTION, each line that is piped in is a message, and only the answers are printed.
    """
    if model is not None and not Path(model).exists() and (SETTING.match(model) or " " in model):
        raise InputError(f"{model!r} is no model; name one before it: quintet chat MODEL …")
    settings = [word for word in words if SETTING.match(word)]
    questions = [word for word in words if not SETTING.match(word)]
    if len(questions) > 1:
        raise InputError(
            f"{questions[0]!r} and {questions[1]!r} are two questions; put one into quotes"
        )
    check_options(sampling, settings)
    question = (read_stdin() or "").strip() if questions == ["-"] else "".join(questions)
    if questions and not question:
        raise InputError("the question is empty; pipe one in for -, or put one in quotes")
    if model is None:
        model = choose_model(where["cache_dir"])
    with warnings_as_notes(quiet):
        conversation = Conversation() if begun is None else Conversation.load(Path(begun))
        if system is not None:
            conversation.begin_with(system)
        elif begun is None and (kept := kept_system(model, quiet, where)):
            conversation.begin_with(kept)
        opened = open_model(model, quiet=quiet, **where)
        if not opened.tokenizer.chat_template:
            raise ChatTemplateError(
                f"{model!r} has no chat template: it continues texts and was not trained to "
                "answer; use `quintet generate`, or the chat version of the model"
            )
        options, generator, seed = choose(
            opened.model.device,
            seed,
            sampling,
            settings,
        )
        config = applied(opened.model.generation_config, options)
        talk = _Talk(opened, config, generator, conversation, reasoning, quiet)
        most = "" if _limits(config) else f", at most {LONGEST_ANSWER:,} tokens an answer"
        note(f"{opened.describe()}; {describe(config, seed)}{most}", quiet)
        if questions:
            talk.answer(question)
            return
        note("/help lists the commands", quiet or not sys.stdin.isatty())
        talk.run()


def _limits(config: "GenerationConfig") -> bool:
    """Tell whether options say how long an answer may be."""
    return config.max_new_tokens is not None or config.max_length is not None


class _Talk:
    """A conversation with a model: what is typed is a message, or a command to us."""

    def __init__(
        self,
        opened: Opened,
        config: "GenerationConfig",
        generator: "torch.Generator",
        conversation: Conversation,
        reasoning: "Shown",
        quiet: bool,
    ) -> None:
        self.opened = opened
        self.config = config
        self.generator = generator
        self.conversation = conversation
        self.reasoning = reasoning
        self.quiet = quiet
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/help": (self._help, "", "this list"),
            "/reset": (self._reset, "", "forget the conversation"),
            "/system": (self._system, "TEXT", "begin again with TEXT as the system message"),
            "/set": (self._set, "NAME=VALUE", "set options of generate(); alone: show them"),
            "/regen": (self._regen, "", "answer the last message again"),
            "/undo": (self._undo, "", "take the last message and its answer back"),
            "/save": (self._save, "[FILE]", "write the conversation to a file"),
            "/load": (self._load, "FILE", "go on with one from a file"),
            "/exit": (self._exit, "", "leave (so does Ctrl-D; Ctrl-C stops an answer)"),
        }
        # What other programs call them.
        self.other_names = {
            "/bye": "/exit",
            "/quit": "/exit",
            "/clear": "/reset",
            "/retry": "/regen",
        }

    def run(self) -> None:
        """Read messages and answer them until the input ends."""
        with Console(list(self.commands)) as console:
            interrupted = False
            while True:
                try:
                    text = console.read()
                except EOFError:
                    if console.at_terminal:
                        click.echo(err=True)
                    return
                except KeyboardInterrupt:
                    click.echo(err=True)
                    if interrupted or not console.at_terminal:
                        return
                    interrupted = True
                    click.echo("Ctrl-C once more leaves.", err=True)
                    continue
                interrupted = False
                if console.at_terminal and text in ("exit", "quit"):
                    return
                try:
                    self._hear(text)
                except EOFError:
                    return
                except QuintetError as error:
                    if not console.at_terminal:
                        raise
                    complain(f"error: {error}")

    def _hear(self, text: str) -> None:
        if text.startswith("//"):
            # A message that begins with a slash.
            self.answer(text[1:])
        elif text.startswith("/"):
            name, _, rest = text.partition(" ")
            name = self.other_names.get(name, name)
            if name in self.commands:
                self.commands[name][0](rest.strip())
            else:
                near = difflib.get_close_matches(name, self.commands, n=1)
                hint = f"Did you mean {near[0]}?" if near else "/help lists them."
                raise InputError(f"there is no command {name}. {hint}")
        elif text:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Answer one message, and keep both unless there is no answer."""
        from quintet.cli.answer import Answer

        tokenizer, model = self.opened.tokenizer, self.opened.model
        messages = self.conversation.with_question(text)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        context = model.config.max_position_embeddings
        config = with_default_length(self.opened, self.config, ids.shape[1], LONGEST_ANSWER)
        waiting = Waiting(f"reading {counted(ids.shape[1])}", self.quiet)
        answer, output = Answer(tokenizer, prompt, self.reasoning, waiting), None
        # What there is when Ctrl-C is pressed is the answer, and has been shown.
        with contextlib.suppress(KeyboardInterrupt), unechoed(), waiting:
            output = self.opened.generator_model.generate(
                ids,
                config,
                tokenizer=tokenizer,
                streamer=answer,
                generator=self.generator,
                return_dict_in_generate=True,
            )
        if output is None and not answer.tokens:
            note("stopped before the answer began; the message is taken back", self.quiet)
            return
        self.conversation.add(text, answer.text, answer.thought)
        self._report(answer, speculation_of(output), ids.shape[1] + answer.tokens, context)
        if output is not None:
            ended = cut(config, output.sequences[0, ids.shape[1] :], context - ids.shape[1])
            if ended is not None:
                note(ended, self.quiet)

    def _report(
        self, answer: "Answer", speculation: "Speculation | None", used: int, context: int
    ) -> None:
        later = answer.tokens - 1
        figures = counted(answer.tokens)
        if later > 0:
            figures += f", {later / max(answer.seconds - answer.reading, 1e-9):.1f} tokens/s"
        figures += draft_summary(speculation)
        if answer.reading >= LONG:
            figures += f", {answer.reading:.1f} s to the first"
        note(f"{figures}, context {used} of {context}", self.quiet)

    # -- commands -------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        lines = [
            f"{f'{name} {argument}':<18}{meaning}"
            for name, (_, argument, meaning) in self.commands.items()
        ]
        lines.append('A message of several lines stands between two """. // begins one with a /.')
        click.echo("\n".join(lines), err=True)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        kept = " but the system message" if self.conversation.system else ""
        click.echo(f"forgotten: all{kept}", err=True)

    def _system(self, text: str) -> None:
        self.conversation = Conversation(text or None)
        click.echo(f"begun again, {'with' if text else 'without'} a system message", err=True)

    def _set(self, text: str) -> None:
        given = parse(text.split())
        reasoning = given.pop("reasoning", self.reasoning)
        if reasoning not in REASONING:
            raise InputError(f"reasoning={reasoning!r} has to be one of {', '.join(REASONING)}")
        seed = seed_of(given.pop("seed", None))
        given = drawn(given)
        usual = self.opened.model.generation_config
        self.config = applied(self.config, given)
        # None is the checkpoint's own choice again.
        own = {name: getattr(usual, name) for name, value in given.items() if value is None}
        self.config = dataclasses.replace(self.config, **own)
        self.reasoning = reasoning
        if seed is not None:
            self.generator.manual_seed(seed)
        click.echo(f"{describe(self.config)}, reasoning={self.reasoning}", err=True)

    def _regen(self, _: str) -> None:
        if (text := self.conversation.undo()) is None:
            raise InputError("there is no message to answer again")
        self.answer(text)

    def _undo(self, _: str) -> None:
        if (text := self.conversation.undo()) is None:
            raise InputError("there is no message to take back")
        first, *more = text.splitlines()
        click.echo(f"taken back: {first}{' …' if more else ''}", err=True)

    def _save(self, name: str) -> None:
        path = Path(name or f"chat-{time.strftime('%Y%m%d-%H%M%S')}.json").expanduser()
        self.conversation.save(path, model=self.opened.name)
        click.echo(f"saved to {path}", err=True)

    def _load(self, name: str) -> None:
        if not name:
            raise InputError("which file? /load FILE")
        self.conversation = Conversation.load(Path(name).expanduser())
        click.echo(f"{len(self.conversation.messages)} messages from {name}", err=True)

    def _exit(self, _: str) -> None:
        raise EOFError
