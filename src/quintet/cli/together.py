"""A command in several processes: the first reads and talks, the others do the same in silence."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from quintet.errors import DisagreementError, QuintetError, RankFailedError

if TYPE_CHECKING:
    from quintet.cli.answer import AnswerPrinter
    from quintet.cli.conversation import Message
    from quintet.cli.partner import Outcome, Partner
    from quintet.parallel.faults import Watch


def several() -> bool:
    """Return whether a launcher such as torchrun started other processes, too."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def follows() -> bool:
    """Return whether this process follows another one, which talks and reads."""
    return several() and os.environ.get("RANK", "0") != "0"


def begin() -> None:
    """Join the processes that a launcher started; all but the first are silent from here on.

    Raises:
        DistributedError: they do not come together.
    """
    if not several():
        return
    from quintet.parallel.launch import connect

    if follows():
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        # What has to be said all the same goes to sys.__stderr__.
        sys.stderr = os.fdopen(nothing, "w", encoding="utf-8")
    connect()


def speak() -> None:
    """Let this process write on standard error after all, as the leader of a group does."""
    sys.stderr = sys.__stderr__


def from_first(read: Callable[[], str]) -> str:
    """Return the first process's input, in all processes."""
    watch = _watch()
    if watch is None:
        return read()
    if watch.rank == 0:
        text = read()
        _send(watch, text)
        return text
    return str(_receive(watch))


def least(number: int) -> int:
    """Send a number to the first process; return the smallest of all there."""
    watch = _watch()
    assert watch is not None, "there is nobody else"
    watch.store.set(f"least/{watch.rank}", str(number))
    if watch.rank:
        return number
    return min(int(watch.store.get(f"least/{rank}")) for rank in watch.who)


def last_words(error: QuintetError) -> str | None:
    """Report to the others why this process ends, and return the message to print, if any."""
    watch = _watch()
    if watch is None:
        return str(error)
    from quintet.parallel import faults

    found = faults.last_words(error)
    if found is error and not isinstance(error, RankFailedError):
        return str(error)
    if found is not None:
        watch.say(found)
    return None


def wait_for_first() -> "Watch":
    """Leave the end by a signal to the first process, which gets it, too; return the watch."""
    watch = _watch()
    assert watch is not None, "there is nobody to wait for"
    watch.leave_it_to_others()
    return watch


def interrupted() -> None:
    """Report to the others that Ctrl-C ends this process; one prints it."""
    watch = _watch()
    if watch is not None:
        watch.end_by(signal.SIGINT)


class Led:
    """A partner that others have a part of: each receives its orders, and its end.

    Args:
        partner: this process's.
    """

    def __init__(self, partner: "Partner") -> None:
        self._partner = partner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._say("interrupt" if kind is KeyboardInterrupt else "leave", None)

    @property
    def name(self) -> str:
        """The model's."""
        return self._partner.name

    @property
    def context(self) -> int | None:
        """The maximum number of tokens of prompt and answer."""
        return self._partner.context

    def describe(self) -> str:
        """Describe the model and its settings in a line."""
        return self._partner.describe()

    def answer(self, messages: "Sequence[Message]", answer: "AnswerPrinter") -> "Outcome":
        """Answer messages."""
        self._say("answer", list(messages))
        return self._partner.answer(messages, answer)

    def set(self, given: dict[str, Any]) -> str:
        """Set options, and say in a line which hold."""
        self._say("set", given)
        return self._partner.set(given)

    def take(self, model: str) -> str:
        """Return the name of the model; there is no other."""
        return self._partner.take(model)

    def _say(self, order: str, value: object) -> None:
        if (watch := _watch()) is not None:
            _send(watch, [order, value])


def follow(partner: "Partner", *, unread: bool = False) -> None:
    """Carry out the orders of the first process's partner, until that one leaves.

    Ctrl-C ends both: a launcher passes it on to all, and takes it for the end.

    Args:
        partner: this process's.
        unread: whether it makes texts of its own, that nobody reads.
    """
    from quintet.cli.answer import AnswerPrinter

    watch = _watch()
    assert watch is not None, "there is nobody to follow"
    while True:
        order, value = _receive(watch)
        if order == "leave":
            return
        if order == "interrupt":
            raise KeyboardInterrupt
        # The first process hears the same, and says it.
        try:
            if order == "set":
                partner.set(value)
            else:
                partner.answer(value, AnswerPrinter("hide", quiet=True))
        except DisagreementError:
            raise
        except RankFailedError:
            # What failed there is said there; whether that one has ended is heard next.
            if not unread:
                raise
        except QuintetError:
            continue


def _watch() -> "Watch | None":
    if not several():
        return None
    from quintet.parallel import faults

    return faults.watch()


def _send(watch: "Watch", value: object) -> None:
    watch.store.set(f"told/{watch.store.add('told', 1)}", json.dumps(value))


def _receive(watch: "Watch") -> Any:
    """Wait for the first process's next order, however long it takes."""
    from datetime import timedelta

    import torch.distributed as dist

    try:
        key = f"told/{watch.store.add(f'heard/{watch.rank}', 1)}"
        while not watch.store.check([key]):
            if watch.store.check(["alarm"]):
                # Whoever failed has said it, or will.
                raise SystemExit(1)
            try:
                watch.store.wait([key], timedelta(seconds=1))
            except dist.DistStoreError:
                continue
        return json.loads(watch.store.get(key))
    except RuntimeError as error:
        raise RankFailedError(0, f"({watch.who[0]}) is gone") from error
