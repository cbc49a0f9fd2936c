"""An engine in several processes: the first one decides what to run, all run it.

Which sequences a step is over, what of a prompt is known and whose row is taken back is decided by
one process alone. The others hold the same rows, with their heads of keys and values, and do to
them what they are told.
"""

import json
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from datetime import timedelta
from itertools import count
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from quintet.cache import RowContent
from quintet.errors import InputError, RankFailedError
from quintet.generation.fixed_step import Recording
from quintet.generation.rows import Cached, Piece, Rows
from quintet.generation.speculative.led import LedPredictionRows, read_beside
from quintet.generation.speculative.pooled import PredictionRows
from quintet.generation.speculative.prediction import MTPModel
from quintet.parallel.agree import Agreement
from quintet.parallel.experts import lockstep_of
from quintet.parallel.world import World

# Most orders fit into so many bytes, behind their length.
SMALL, HEAD = 2048, 8
# A server may have nothing to do for long; that a process is gone is noticed all the same.
EVER = timedelta(days=365)


class Orders:
    """Messages from the leading process to the others."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._first = dist.get_process_group_ranks(group)[0]
        self.leads = dist.get_rank(group) == 0

    @classmethod
    def of(cls, world: World | None) -> "Orders | None":
        """Return the orders of a model's processes, or None for one process.

        All have to ask for them at the same time once.
        """
        together = None if world is None else world.groups.get("model")
        if world is None or together is None:
            return None
        if "orders" not in world.groups:
            ranks = dist.get_process_group_ranks(together)
            world.groups["orders"] = dist.new_group(
                ranks, timeout=EVER, backend="gloo", use_local_synchronization=True
            )
        return cls(world.groups["orders"])

    def give(self, order: str, *arguments: Any) -> None:
        """Send an order to the others."""
        text = json.dumps([order, *arguments]).encode()
        length = len(text).to_bytes(HEAD)
        self._send((length + text[: SMALL - HEAD]).ljust(SMALL))
        if len(text) > SMALL - HEAD:
            self._send(text)

    def take(self) -> tuple[str, list[Any]]:
        """Wait for an order."""
        message = self._receive(SMALL)
        length = int.from_bytes(message[:HEAD])
        fits = length <= SMALL - HEAD
        order, *arguments = json.loads(
            message[HEAD : HEAD + length] if fits else self._receive(length)
        )
        return order, arguments

    def _send(self, text: bytes) -> None:
        sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(sent, self._first, group=self._group)

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), self._first, group=self._group)
        return bytes(buffer)


def rows_of(
    model: Cached,
    count: int,
    capacity: int,
    nbits: int | None = None,
    recording: Recording | None = None,
) -> Rows:
    """Return the rows for an engine, in all processes of the model.

    Steps are recorded where one process holds it.

    Raises:
        InputError: this process does not lead.
    """
    orders = Orders.of(model.world)
    if orders is None:
        return Rows(model, count, capacity, nbits, recording)
    if not orders.leads:
        raise InputError(
            "the model is held by several processes, of which the first has the engine; call "
            "quintet.serving.follow(model) in the others"
        )
    return LedRows(orders, model, count, capacity, nbits)


def check_led(model: Cached, assistant: object) -> None:
    """Refuse an assistant that the leading process cannot run alone.

    Raises:
        InputError: several processes hold it.
    """
    alone = assistant is None or Agreement.of(cast("Cached", assistant).world) is None
    if Agreement.of(model.world) is not None and not alone:
        raise InputError(
            "the assistant_model is held by several processes, and an engine's drafts are its own "
            "process's; load it whole, draft by prompt_lookup_num_tokens, or call generate()"
        )


@contextmanager
def leading(model: Cached) -> Iterator[None]:
    """Release the other processes from `follow` at the end of the context."""
    lost = False
    try:
        yield
    except RankFailedError:
        # The others ran the same, and do not follow any more.
        lost = True
        raise
    finally:
        orders = Orders.of(model.world)
        if orders is not None and not lost:
            orders.give("leave")


class LedRows(Rows):
    """Rows of the leading process, mirrored by the others."""

    def __init__(
        self, orders: Orders, model: Cached, count: int, capacity: int, nbits: int | None
    ) -> None:
        self._orders = orders
        # No others that are there have it.
        self._name = id(self)
        self._dropped: deque[int] = deque()
        self._send_order("begin", count, capacity, nbits)
        super().__init__(model, count, capacity, nbits)

    def open(self, *contents: RowContent) -> int | None:
        """Return a row with the given content, or None if all are taken."""
        if len(self.cache.rows) == self.count:
            return None
        self._send_order("open", [cast("_LedContent", one).number for one in contents])
        return self.cache.join(*contents)

    def close(self, row: int) -> None:
        """Free a row."""
        self._send_order("close", row)
        super().close(row)

    def rewind(self, row: int, length: int) -> int:
        """Take a row back to a length, or the nearest one before."""
        self._send_order("rewind", row, length)
        return super().rewind(row, length)

    def extract(self, row: int, start: int = 0, stop: int | None = None) -> RowContent:
        """Copy a row for a range of its tokens; each process keeps its own heads."""
        content = super().extract(row, start, stop)
        led = _LedContent(content, self._send_order, self._dropped)
        self._send_order("extract", row, content.start, content.stop, led.number)
        return led

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces in one forward; return the kept logits (N, V)."""
        self._send_order("run", [astuple(piece) for piece in pieces])
        return super().run(pieces)

    def prediction(self, capacity: int) -> PredictionRows:
        """Return rows for the model's prediction layers, in all processes."""
        agreement = Agreement.of(self.model.world)
        assert agreement is not None
        model = cast("MTPModel", self.model)
        return LedPredictionRows(self._send_order, agreement, model, self.count, capacity)

    def attend(self) -> bool:
        """Run once what others send to the experts here; return whether they sent something."""
        self._send_order("attend")
        return super().attend()

    def leave(self, why: BaseException | None) -> None:
        """Attend until all others leave; or let all end, if this process failed."""
        self._send_order("part", None if why is None else str(why))
        super().leave(why)

    def end(self) -> None:
        """Drop these rows in all processes."""
        self._send_order("end")

    def _send_order(self, order: str, *arguments: Any) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self._orders.give(order, self._name, dropped, *arguments)


class _LedContent(RowContent):
    """Extracted content; the other processes hold their parts under a number."""

    number: int
    _send_order: Callable[..., None]
    _dropped: deque[int]
    numbers = count()

    def __init__(self, content: RowContent, tell: Callable[..., None], dropped: deque[int]) -> None:
        super().__init__(
            content.start,
            content.stop,
            content.layers,
            content.states,
            content.kind,
            content.adapters,
        )
        # What is derived of a frozen class is not frozen, but has its way of setting.
        vars(self).update(number=next(self.numbers), _send_order=tell, _dropped=dropped)
        weakref.finalize(self, dropped.append, self.number).atexit = False

    def split(self, at: int) -> tuple[RowContent, RowContent]:
        """Split at a slot; the first part has no recurrent states."""
        head, tail = (
            _LedContent(one, self._send_order, self._dropped) for one in super().split(at)
        )
        self._send_order("split", self.number, at, head.number, tail.number)
        return head, tail

    def without_states(self) -> RowContent:
        """Return the content without recurrent states."""
        if not self.states:
            return self
        plain = RowContent(self.start, self.stop, self.layers, None, self.kind, self.adapters)
        led = _LedContent(plain, self._send_order, self._dropped)
        self._send_order("bare", self.number, led.number)
        return led


@torch.no_grad()
def follow(model: Cached) -> None:
    """Run what the engine's process runs, until it closes the engine.

    Args:
        model: this process's part of the model.

    Raises:
        InputError: one process has all of the model, or this is the one that leads.
        RuntimeError: the process that leads is gone.
    """
    orders = Orders.of(model.world)
    if orders is None or orders.leads:
        raise InputError(
            "only a process beside the first of several that hold a model follows; make an Engine "
            "in this one"
        )
    follower = _Follower(model)
    while True:
        order, arguments = orders.take()
        if order == "leave":
            return
        follower.obey(order, *arguments)


@torch.no_grad()
def accompany(model: object) -> None:
    """Run the experts of this process, which has no text, until the others are done with theirs.

    Raises:
        InputError: the model's experts are not among processes with texts of their own.
        RankFailedError: another process failed.
    """
    lockstep = lockstep_of(model)
    if lockstep is None:
        raise InputError(
            "only a process that exchanges experts' tokens accompanies others: load the model "
            "with an ep_size that is more than tp_size"
        )
    with lockstep.until_all_are_done(None):
        pass


class _Follower:
    """A mirror of the leading process's rows and extracted contents."""

    def __init__(self, model: Cached) -> None:
        self.model = model
        agreement = Agreement.of(model.world)
        assert agreement is not None
        self.agreement = agreement
        self.leads = agreement.ranks[0]
        self.rows: dict[int, Rows] = {}
        self.predictions: dict[int, PredictionRows] = {}
        self.contents: dict[int, RowContent] = {}

    def obey(self, order: str, name: int, dropped: list[int], *arguments: Any) -> None:
        """Carry out one order."""
        for number in dropped:
            self.contents.pop(number, None)
        if order == "begin":
            self.rows[name] = Rows(self.model, *arguments)
        elif order == "end":
            del self.rows[name]
            self.predictions.pop(name, None)
        elif order.startswith("predict"):
            self._predict(order, name, *arguments)
        elif order == "run":
            self.rows[name].run([Piece(*piece) for piece in arguments[0]])
        elif order == "attend":
            self.rows[name].attend()
        elif order == "part":
            (why,) = arguments
            self.rows[name].leave(None if why is None else RankFailedError(self.leads, why))
        else:
            # The process that leads is told the same of its own, and says so.
            with suppress(InputError):
                self._change(order, self.rows[name], *arguments)

    def _predict(self, order: str, name: int, *arguments: Any) -> None:
        if order == "predict":
            self.predictions[name] = PredictionRows(cast("MTPModel", self.model), *arguments)
        elif order == "predict.join":
            self.predictions[name].join()
        elif order == "predict.free":
            self.predictions[name].free(*arguments)
        else:
            read_beside(self.model, self.agreement, self.predictions[name], *arguments)

    def _change(self, order: str, rows: Rows, *arguments: Any) -> None:
        contents = self.contents
        if order == "open":
            rows.open(*(contents[number] for number in arguments[0]))
        elif order == "close":
            rows.close(*arguments)
        elif order == "rewind":
            rows.rewind(*arguments)
        elif order == "extract":
            row, start, stop, number = arguments
            contents[number] = rows.extract(row, start, stop)
        elif order == "split":
            number, at, head, tail = arguments
            contents[head], contents[tail] = contents[number].split(at)
        else:
            assert order == "bare", f"there is no order {order}"
            number, plain = arguments
            contents[plain] = contents[number].without_states()
