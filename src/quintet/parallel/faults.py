"""Reports why a process of several ends, and finds out which of them failed.

Connections break one after the other where one process fails, and say of none why. So each process
leaves a word where all find it before it ends; who left none is dead, or stands still. A thread
answers for a process that is well, and ends it where it waits for others in vain.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from quintet.errors import RankFailedError
from quintet.parallel.verdict import Kind, Process, Word, place_of, verdict

# So long others have to say a word: a thread of theirs does, within milliseconds.
GRACE = 1.2
# So often a process asks whether another failed.
LISTEN = 0.2
# So long a process has to find out by itself that another failed.
BY_ITSELF = 1.0
# So long who keeps the words waits until the others know them.
READ = 3.0
# What gloo, NCCL and the store write of connections and of time.
BROKEN = ("closed by peer", "reset by peer", "roken pipe", "onnection refused", "remote process")
LATE = ("imed out", "imeout")
UNEVEN = "preamble"


@dataclass(slots=True)
class Watch:
    """Tells the other processes of a failure, and watches for theirs.

    Attributes:
        store: where words are left.
        rank: which process this is.
        who: all of them.
        seconds: that they wait for each other.
        node: what tells machines apart.
        keeps: whether this process keeps the store, which ends with it.
    """

    store: Store
    rank: int
    who: dict[int, Process]
    seconds: float
    node: str
    keeps: bool
    _reported: bool = field(default=False, init=False)
    _waited_for: int = field(default=0, init=False)
    _noted: int | None = field(default=None, init=False)
    _last_signal: int | None = field(default=None, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False, repr=False)
    _thread: threading.Thread | None = field(default=None, init=False, repr=False)

    # -- words ---------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        self._waited_for = len(self.who) - 1

    def tell(self, kind: Kind, text: str, place: tuple[str, bool], *, alarm: bool = True) -> None:
        """Leave a word for the others; with an alarm they hear it at once."""
        word = Word(self.rank, kind, text, *place)
        # Where the store is gone, so is who kept it, and all others.
        with suppress(RuntimeError):
            number = self.store.add("words", 1)
            self.store.set(f"word/{number}", json.dumps(asdict(word)))
            if alarm:
                self.store.set("alarm", "1")

    def words(self) -> dict[int, Word]:
        """Return a word of each process that said one, in the order of their first ones.

        Raises:
            RuntimeError: who kept the words is gone.
        """
        found: dict[int, Word] = {}
        for number in range(1, self.store.add("words", 0) + 1):
            word = Word(**json.loads(self.store.get(f"word/{number}")))
            # What a process says of itself counts more than that it is alive.
            if word.kind != "waits" or word.rank not in found:
                found[word.rank] = word
        return found

    def explain(self, error: BaseException) -> BaseException | None:
        """Report an error to the others, and return it, or a `RankFailedError` of its cause.

        None if all were told to end.
        """
        self._reported = True
        place = place_of(traceback.walk_tb(error.__traceback__))
        if isinstance(error, RankFailedError):
            self.tell("lost", str(error), place)
            return error
        kind = _kind(error, inside=place[1])
        self.tell(kind, _in_a_line(error), place)
        return error if kind in ("failed", "interrupted") else self._found(late=kind == "late")

    def _found(self, *, late: bool) -> RankFailedError | None:
        try:
            words = self._all_words()
        except RuntimeError:
            # The words are kept by rank 0, or what started it.
            return RankFailedError(0, f"({self.who[0]}) is gone, and what was said with it")
        self._waited_for = len(words.keys() - {self.rank})
        if late:
            self._wake(words)
        return verdict(words, self.who, self.seconds, late=late)

    def _all_words(self) -> dict[int, Word]:
        """Return the words of all, or of those that said one within a moment."""
        until = time.monotonic() + GRACE
        while True:
            words = self.words()
            known = any(word.kind == "failed" and word.rank != self.rank for word in words.values())
            if known or len(words) == len(self.who) or time.monotonic() > until:
                return words
            time.sleep(0.02)

    def _let_read(self) -> None:
        """Wait, in the process that keeps the store, until the others have read the words."""
        with suppress(RuntimeError):
            if not self.keeps:
                self.store.add("read", 1)
                return
            until = time.monotonic() + READ
            while self.store.add("read", 0) < self._waited_for and time.monotonic() < until:
                time.sleep(0.02)

    def _wake(self, words: dict[int, Word]) -> None:
        """Continue stopped processes of this machine: no launcher can end them otherwise."""
        host = self.who[self.rank].host
        for rank, process in self.who.items():
            if rank not in words and process.host == host:
                with suppress(OSError):
                    os.kill(process.pid, signal.SIGCONT)

    def say(self, found: BaseException) -> None:
        """Write the failed process on standard error, once on a machine."""
        _tell_launcher(str(found))
        self._print_once(f"error: {found}")

    def _print_once(self, text: str) -> None:
        first = True
        with suppress(RuntimeError):
            first = self.store.add(f"said/{self.node}", 1) == 1
        if first:
            print(text, file=sys.__stderr__, flush=True)

    # -- while it runs -------------------------------------------------------------------------

    def answer(self) -> None:
        """Wait until a process fails; say then where this one is, and end it where it is stuck."""
        main = threading.main_thread().ident
        with suppress(RuntimeError):
            store: Store = self.store.clone()  # type: ignore[attr-defined]
            # Not waited for within the store: Python cannot end a thread in there.
            while not store.check(["alarm"]):
                if self._over.wait(LISTEN):
                    return
            if not self._reported:
                self.tell("waits", "", _place_of_thread(main), alarm=False)
            if self._over.wait(BY_ITSELF):
                return
            if self._reported:
                return
            if _place_of_thread(main)[1]:
                self._reported = True
                late = any(word.kind == "late" for word in self.words().values())
                found = self._found(late=late)
                if found is not None and self.last_signal is None:
                    self.say(found)
                sys.stdout.flush()
                self._let_read()
                os._exit(1 if self.last_signal is None else 128 + self.last_signal)
            if not self.keeps:
                # It may be long until this one finds out: it is not waited for.
                self._let_read()

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """End: so a launcher ends all others where one failed, and it may be the first to know."""
        if self._reported:
            return
        self._reported = True
        self.tell("ended", "", place_of(_outermost_first(frame)))
        if (found := self._found(late=False)) is not None:
            self.say(found)
        else:
            self._print_once(_ended_by(number))
        raise SystemExit(128 + number)

    def leave_it_to_others(self) -> None:
        """Note from now on the signals that end this process, and run on until others end."""
        self._noted, into = os.pipe()
        for end in (self._noted, into):
            os.set_blocking(end, False)
        # Python calls no function while it waits in a collective, but this is written at once.
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)

    @property
    def last_signal(self) -> int | None:
        """The last signal that was noted."""
        if self._noted is not None:
            with suppress(BlockingIOError):
                self._last_signal = os.read(self._noted, 64)[-1]
        return self._last_signal

    def end_by(self, number: int) -> None:
        """Announce the end by a signal to the others, and print it once on a machine."""
        if self._reported:
            return
        self._reported = True
        self.tell("interrupted", "", ("", False))
        self._print_once(_ended_by(number))

    def leave(self) -> None:
        """Mark this process as ended, and take it out of the group."""
        if threading.current_thread() is threading.main_thread():
            # It is about to end.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        well = not self._reported
        if well:
            self._reported = True
            self.tell("left", "", ("", False), alarm=False)
        if not (well and self.keeps):
            self._let_read()
        self._over.set()
        if self._thread is not None:
            self._thread.join(READ)
        if well and dist.is_initialized():
            dist.destroy_process_group()

    def listen(self) -> None:
        """Watch from now on, in a thread, for other processes' failures."""
        self._thread = threading.Thread(target=self.answer, name="quintet-watch", daemon=True)
        self._thread.start()


@dataclass(frozen=True, slots=True)
class _Hook:
    """Interface of `sys.excepthook`."""

    watch: Watch
    before: Callable[..., Any]

    def __call__(
        self, kind: type[BaseException], error: BaseException, frames: TracebackType | None
    ) -> None:
        found = last_words(error)
        if isinstance(found, RankFailedError):
            if os.environ.get("QUINTET_DEBUG"):
                self.before(kind, error, frames)
            self.watch.say(found)
        elif found is not None:
            self.before(kind, error, frames)


def begin(watch: Watch) -> None:
    """Watch over this process from now on."""
    sys.excepthook = _Hook(watch, sys.excepthook)
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, watch.on_sigterm)
    watch.listen()


def watch() -> Watch | None:
    """Return the watch over this process; None if it is the only one."""
    hook = sys.excepthook
    return hook.watch if isinstance(hook, _Hook) else None


def last_words(error: BaseException) -> BaseException | None:
    """Report an error that ends this process to the others, and return whose error it is.

    That is the same, or a `RankFailedError`; None if all were told to end.
    """
    watching = watch()
    if watching is None or isinstance(error, SystemExit):
        return error
    found = watching.explain(error)
    if found is error:
        _tell_launcher(_in_a_line(error))
    return found


@contextmanager
def collective() -> Iterator[None]:
    """Attribute a failure inside to the other process that caused it.

    Raises:
        RankFailedError: another process failed, is gone, or did not come.
    """
    try:
        yield
    except RuntimeError as error:
        watching = watch()
        if watching is None or _kind(error, inside=True) == "failed":
            raise
        found = watching.explain(error)
        raise SystemExit(143) if found is None else found from error


def _kind(error: BaseException, *, inside: bool) -> Kind:
    """Classify an error, raised inside a collective or elsewhere."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error)
    if inside and isinstance(error, RuntimeError):
        if any(word in text for word in LATE):
            return "late"
        if any(word in text for word in BROKEN):
            return "lost"
    return "failed"


def _ended_by(number: int) -> str:
    return f"ended by {signal.Signals(number).name}, as are the other processes"


def _in_a_line(error: BaseException) -> str:
    text = str(error)
    if UNEVEN in text:
        text = "it was sent a tensor of another size than it waits for"
    return f"{type(error).__name__}: {' '.join(text.split())}"[:1000]


def _outermost_first(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    return [*traceback.walk_stack(frame)][::-1] if frame is not None else []


def _place_of_thread(ident: int | None) -> tuple[str, bool]:
    frame = sys._current_frames().get(ident or 0)
    return place_of(_outermost_first(frame))


def _tell_launcher(text: str) -> None:
    """Write the failed process's error where torchrun shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        with suppress(OSError):
            more = {"py_callstack": text, "timestamp": str(int(time.time()))}
            report = {"message": {"message": text, "extraInfo": more}}
            Path(path).write_text(json.dumps(report), encoding="utf-8")
