"""`quintet chat`: talk with a model in the terminal."""

import contextlib
import difflib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quintet.cli.console import Console
from quintet.cli.conversation import Conversation
from quintet.cli.local import Local
from quintet.cli.offers import choose_model
from quintet.cli.options import (
    check_options,
    model_options,
    read_stdin,
    sampling_options,
    stored_system_message,
    warnings_as_notes,
)
from quintet.cli.partner import Outcome, Partner
from quintet.cli.results import counted
from quintet.cli.servers import is_address, key_for, key_option
from quintet.cli.settings import SETTING, parse
from quintet.cli.shaping import AnswerShape, shape_options
from quintet.cli.terminal import complain, note, unechoed
from quintet.cli.together import Led, begin, follow, follows, several
from quintet.errors import InputError, QuintetError

if TYPE_CHECKING:
    from quintet.cli.answer import AnswerPrinter, Shown

REASONING = ("fold", "show", "hide")
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
@shape_options
@model_options
@key_option
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str | None,
    words: tuple[str, ...],
    system: str | None,
    begun: str | None,
    reasoning: "Shown",
    api_key_file: str | None,
    seed: int | None,
    quiet: bool,
    sampling: dict[str, Any],
    shape: AnswerShape,
    **where: Any,
) -> None:
    """Talk with MODEL, a directory or hub id of a model with a chat template.

    Or with one of a server, whose address is given instead: http://127.0.0.1:8000. Without MODEL,
    ask which of those on this machine. With a QUESTION, answer it and leave; - is all that is piped
    in. NAME=VALUE sets any option of generate(), such as temperature=0.7. Without a QUESTION, each
    line that is piped in is a message, and only the answers are printed.
    """
    begin()
    if model is not None and not Path(model).exists() and (SETTING.match(model) or " " in model):
        raise InputError(f"{model!r} is no model; name one before it: quintet chat MODEL …")
    settings = [word for word in words if SETTING.match(word)]
    questions = [word for word in words if not SETTING.match(word)]
    if len(questions) > 1:
        raise InputError(
            f"{questions[0]!r} and {questions[1]!r} are two questions; put one into quotes"
        )
    served = is_address(model)
    if not served:
        if api_key_file is not None:
            raise InputError("--api-key-file is the key of a server; MODEL is no address of one")
        check_options(sampling, settings)
    if follows() and model is not None and not served:
        local = Local(model, seed, sampling, settings, quiet, where, shape)
        follow(local, unread=local.opened.unread)
        return
    question = (read_stdin() or "").strip() if questions == ["-"] else "".join(questions)
    if questions and not question:
        raise InputError("the question is empty; pipe one in for -, or put one in quotes")
    if model is None:
        if several():
            raise InputError("several processes are started; name the model they are to hold")
        model = choose_model(where["cache_dir"])
    with warnings_as_notes(quiet):
        conversation = Conversation() if begun is None else Conversation.load(Path(begun))
        if system is not None:
            conversation.begin_with(system)
        elif (
            not served
            and begun is None
            and (kept_message := stored_system_message(model, quiet, where))
        ):
            conversation.begin_with(kept_message)
        if served:
            from quintet.cli.remote import Remote

            key = key_for(model, api_key_file, context)
            fields = {**sampling, **shape.fields, "seed": seed, **parse(settings)}
            _talk(_Talk(Remote(model, key, fields), conversation, reasoning, quiet), question)
            return
        with Led(Local(model, seed, sampling, settings, quiet, where, shape)) as partner:
            _talk(_Talk(partner, conversation, reasoning, quiet), question)


def _talk(talk: "_Talk", question: str) -> None:
    """Have one question answered, or all that come."""
    note(talk.partner.describe(), talk.quiet)
    if question:
        talk.answer(question)
        return
    note("/help lists the commands", talk.quiet or not sys.stdin.isatty())
    talk.run()


class _Talk:
    """A conversation with a model: a typed line is a message, or a command to us."""

    def __init__(
        self, partner: Partner, conversation: Conversation, reasoning: "Shown", quiet: bool
    ) -> None:
        self.partner = partner
        self.conversation = conversation
        self.reasoning = reasoning
        self.quiet = quiet
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/help": (self._help, "", "this list"),
            "/reset": (self._reset, "", "forget the conversation"),
            "/system": (self._system, "TEXT", "begin again with TEXT as the system message"),
            "/set": (
                self._set,
                "NAME=VALUE",
                "set options of generate(), or a server's; alone: show them",
            ),
            "/model": (self._model, "[NAME]", "of a server's models, take one; alone: list them"),
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
                    if several():
                        raise
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
                    self._handle(text)
                except EOFError:
                    return
                except QuintetError as error:
                    if not console.at_terminal:
                        raise
                    complain(f"error: {error}")

    def _handle(self, text: str) -> None:
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
        from quintet.cli.answer import AnswerPrinter

        answer, outcome = AnswerPrinter(self.reasoning, self.quiet), None
        # What there is when Ctrl-C is pressed is the answer, and has been shown. What started
        # several processes ends with it, and so do they.
        stops = () if several() else (KeyboardInterrupt,)
        with contextlib.suppress(*stops), unechoed(), answer.waiting:
            outcome = self.partner.answer(self.conversation.with_question(text), answer)
        if outcome is None and not answer.tokens:
            note("stopped before the answer began; the message is taken back", self.quiet)
            return
        self.conversation.add(text, answer.text, answer.thought)
        self._report(answer, outcome or Outcome())

    def _report(self, answer: "AnswerPrinter", outcome: Outcome) -> None:
        later = answer.tokens - 1
        figures = counted(answer.tokens)
        if later > 0:
            figures += f", {later / max(answer.seconds - answer.reading, 1e-9):.1f} tokens/s"
        figures += outcome.drafted
        if answer.reading >= LONG:
            figures += f", {answer.reading:.1f} s to the first"
        if answer.prompt is not None and self.partner.context is not None:
            figures += f", context {answer.prompt + answer.tokens} of {self.partner.context}"
        note(figures, self.quiet)
        for line in (outcome.ended, outcome.warning):
            if line is not None:
                note(line, self.quiet)

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
        except_system = " but the system message" if self.conversation.system else ""
        click.echo(f"forgotten: all{except_system}", err=True)

    def _system(self, text: str) -> None:
        self.conversation = Conversation(text or None)
        click.echo(f"begun again, {'with' if text else 'without'} a system message", err=True)

    def _set(self, text: str) -> None:
        given = parse(text.split())
        reasoning = given.pop("reasoning", self.reasoning)
        if reasoning not in REASONING:
            raise InputError(f"reasoning={reasoning!r} has to be one of {', '.join(REASONING)}")
        settings = self.partner.set(given)
        self.reasoning = reasoning
        click.echo(f"{settings}, reasoning={self.reasoning}", err=True)

    def _model(self, name: str) -> None:
        click.echo(self.partner.take(name), err=True)

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
        self.conversation.save(path, model=self.partner.name)
        click.echo(f"saved to {path}", err=True)

    def _load(self, name: str) -> None:
        if not name:
            raise InputError("which file? /load FILE")
        self.conversation = Conversation.load(Path(name).expanduser())
        click.echo(f"{len(self.conversation.messages)} messages from {name}", err=True)

    def _exit(self, _: str) -> None:
        raise EOFError
