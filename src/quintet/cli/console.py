"""The input console: line editing, history, multi-line messages."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

QUOTES = '"""'
LONGEST_HISTORY = 1000


def history_file() -> Path:
    """Return the file of typed lines: `$XDG_STATE_HOME/quintet/chat_history`."""
    state = os.environ.get("XDG_STATE_HOME")
    root = Path(state) if state else Path.home() / ".local" / "state"
    return root / "quintet" / "chat_history"


class Console:
    """Reads messages, at a terminal with editing and history.

    Args:
        commands: what the tab key completes.
    """

    def __init__(self, commands: Sequence[str] = ()) -> None:
        self.at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _readline() if self.at_terminal else None
        self._commands = sorted(commands)
        self._known = 0

    def __enter__(self) -> "Console":
        if (readline := self._readline) is not None:
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
            if not is_libedit and os.environ.get("TERM") != "dumb":
                # What is pasted is one message, however many lines it has.
                readline.parse_and_bind("set enable-bracketed-paste on")
            try:
                readline.read_history_file(history_file())
            except OSError:
                # There is none yet, or it cannot be read: nothing to talk less for.
                readline.clear_history()
            self._known = readline.get_current_history_length()
        return self

    def __exit__(self, *_: object) -> None:
        if (readline := self._readline) is None:
            return
        new = readline.get_current_history_length() - self._known
        path = history_file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What people say to a model is theirs alone.
            path.touch(mode=0o600, exist_ok=True)
            readline.set_history_length(LONGEST_HISTORY)
            if new > 0:
                # Two conversations at once each add their own.
                readline.append_history_file(new, path)
        except OSError:
            return

    def read(self) -> str:
        '''Return the next message.

        It is one line, or what was pasted at once; lines after one that ends with a backslash
        belong to it, and all between two `"""`.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C, while typing.
        '''
        line = self._line("> ").strip()
        if line.startswith(QUOTES):
            return self._quoted(line.removeprefix(QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("... ").rstrip())
            except EOFError:
                break
        return "\n".join(lines).strip()

    def _quoted(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(QUOTES):
            lines.append(line)
            try:
                line = self._line("... ")
            except EOFError:
                # The input ends before the quotes do: what there is counts.
                return "\n".join(lines).strip("\n")
        lines.append(line.rstrip().removesuffix(QUOTES))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        return input(prompt if self.at_terminal else "")

    def _complete(self, text: str, state: int) -> str | None:
        found = [name for name in self._commands if text and name.startswith(text)]
        return found[state] if state < len(found) else None


def _readline() -> ModuleType | None:
    """Return the module that edits the lines of `input()`, or None if the platform has none."""
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None
