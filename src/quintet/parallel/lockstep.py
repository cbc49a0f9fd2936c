"""Processes with texts of their own, whose tokens meet at blocks of experts.

Texts differ in length, and end when they end: the processes are at different blocks, or have
nothing to run. So whoever comes to a block says which one it is, with how many rows it sends there.
Where others are elsewhere, the block that is farthest goes first: those who are not there send
nothing, run what their experts are sent, and are asked again. Nobody leaves before all are done.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from quintet.errors import DisagreementError, DoesNotFitError, QuintetError, RankFailedError
from quintet.parallel.agree import Agreement
from quintet.parallel.interrupts import Interrupts
from quintet.parallel.regions import exchanged

# Where a process is that is at no block: the blocks count from 1.
DONE, IDLE, FAILED, INTERRUPTED = 0, -1, -2, -3
# Where it is, in which numbers it computes, how wide a row is; then how many rows it sends.
HEAD = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of what a process says when it fails.
LETTERS = 1000


class Block(Protocol):
    """A block of experts at which tokens are exchanged."""

    @property
    def own(self) -> int:
        """The number of this process's experts."""
        ...

    def run_sent(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map the rows (M, C) that processes sent, `counts` (P, own) of them by their experts."""
        ...


@dataclass(frozen=True, slots=True)
class Meeting:
    """The counts and layout of the tokens exchanged at a block.

    Attributes:
        block: which one it is, from 1.
        counts: (P, own) how many rows each process sends to each of the experts of this one.
        sent: how many rows this process sends to each.
        received: how many it gets from each.
        dtype: of these rows.
        width: of a row.
    """

    block: int
    counts: Tensor
    sent: list[int]
    received: list[int]
    dtype: torch.dtype
    width: int


@dataclass(slots=True, eq=False)
class Lockstep:
    """The processes that have the experts of one model, and its blocks.

    Attributes:
        group: the processes.
        device: where they compute.
        blocks: in the order in which a forward comes to them.
    """

    group: dist.ProcessGroup
    device: torch.device
    blocks: list[Block] = field(default_factory=list, repr=False)
    # Whether the others wait for this process, or have ended with it: then nothing can be said.
    _over: bool = field(default=False, init=False)
    # What this process says where it fails.
    _why: str = field(default="", init=False)
    _interrupts: Interrupts = field(default_factory=Interrupts, init=False, repr=False)

    # -- at a block --------------------------------------------------------------------------------

    def at(self, number: int, counts: Tensor, x: Tensor) -> Meeting:
        """Wait until it is this block's turn, and serve the others' requests before.

        Args:
            number: the block's.
            counts: (P, own) how many rows this process sends to each expert of each process.
            x: (N, C) what these are of.

        Raises:
            RankFailedError: another process failed.
            DisagreementError: others are elsewhere while gradients are recorded.
        """
        head = number, DTYPES.index(x.dtype), x.shape[1]
        while True:
            meeting, alike = self._meet(head, counts)
            assert meeting is not None, "this process is at a block"
            if torch.is_grad_enabled() and not alike:
                raise DisagreementError(
                    "processes that exchange tokens are at different blocks of experts while "
                    "gradients are recorded; all have to run the same forwards, in the same order"
                )
            if meeting.block == number:
                return meeting
            self._serve(meeting)

    def pass_on(self, meeting: Meeting, rows: Tensor, block: Block) -> Tensor:
        """Send rows (N, C) to their experts' processes, run those received, and return the results.

        What fails here is raised when the others have got something back: they go on.
        """
        came = exchanged(rows, self.group, meeting.sent, meeting.received)
        failed: Exception | None = None
        try:
            outputs = block.run_sent(came, meeting.counts)
        except Exception as error:
            failed, outputs = error, torch.full_like(came, torch.nan)
        back = exchanged(outputs, self.group, meeting.received, meeting.sent)
        self._over = False
        if failed is not None:
            raise failed
        return back

    def _meet(
        self, head: tuple[int, int, int], counts: Tensor | None = None
    ) -> tuple[Meeting | None, bool]:
        """Announce this process's place; return whose turn it is, and whether all agree."""
        self._over = True
        if self._interrupts.take():
            head, counts = (INTERRUPTED, 0, 0), None
        size, most = dist.get_world_size(self.group), max(block.own for block in self.blocks)
        sent_heads = torch.zeros(size, HEAD + most, dtype=torch.long, device=self.device)
        sent_heads[:, :HEAD] = torch.tensor(head, dtype=torch.long, device=self.device)
        if counts is not None:
            sent_heads[:, HEAD : HEAD + counts.shape[1]] = counts
        received_heads = torch.empty_like(sent_heads)
        dist.all_to_all_single(received_heads, sent_heads, group=self.group)
        # This is the one thing that is waited for.
        heads = torch.stack((sent_heads, received_heads)).tolist()
        places = [row[0] for row in heads[1]]
        if min(places) <= FAILED:
            self._end(places)
        block, alike = max(places), min(places) == max(places)
        if block <= DONE:
            return None, alike
        _, dtype, width = heads[1][places.index(block)][:HEAD]
        sent, received = ([_rows(row, block) for row in of_one] for of_one in heads)
        counts_received = received_heads[:, HEAD : HEAD + self.blocks[block - 1].own]
        if not alike:
            counts_received = counts_received * (received_heads[:, :1] == block)
        return Meeting(block, counts_received, sent, received, DTYPES[dtype], width), alike

    @torch.no_grad()
    def _serve(self, meeting: Meeting) -> None:
        """Run what is sent to the experts of this process, which sends nothing."""
        none = torch.empty(0, meeting.width, dtype=meeting.dtype, device=self.device)
        self.pass_on(meeting, none, self.blocks[meeting.block - 1])

    # -- at none -----------------------------------------------------------------------------------

    def attend(self) -> bool:
        """Serve requests at one block, with nothing to run; return whether there were any.

        Raises:
            RankFailedError: another process failed.
        """
        meeting, _ = self._meet((IDLE, 0, 0))
        if meeting is not None:
            self._serve(meeting)
        self._over = False
        return meeting is not None

    def leave(self) -> None:
        """Serve requests until all processes are done.

        Raises:
            RankFailedError: another process failed.
        """
        meeting, alike = self._meet((DONE, 0, 0))
        while meeting is not None or not alike:
            if meeting is not None:
                self._serve(meeting)
            meeting, alike = self._meet((DONE, 0, 0))
        self._over = False

    @contextmanager
    def until_all_are_done(self, agreement: Agreement | None) -> Iterator[None]:
        """Leave at the end of the context, as all do; a failure in one process ends all.

        Args:
            agreement: of the processes that have the same texts, if these are several.

        Raises:
            RankFailedError: another process failed.
            KeyboardInterrupt: another process was interrupted.
        """
        self._over = False
        try:
            with nullcontext() if agreement else self._interrupts.noted():
                yield
                self.leave()
            if self._interrupts.take():
                # It came when all was done.
                raise KeyboardInterrupt
        except BaseException as error:
            place = _end_of(error, agreement)
            if place is not None:
                self.fail(error, place)
            raise
        finally:
            self._over = False
            self._interrupts.take()

    def fail(self, error: BaseException, place: int = FAILED) -> None:
        """Let the others end, too, unless they have, or wait for a message that will not come."""
        if self._over:
            return
        self._why = f"{type(error).__name__}: {error}"
        # Others that are gone, or fail as well, are not what this one is about.
        with suppress(RuntimeError, RankFailedError, KeyboardInterrupt):
            self._meet((place, 0, 0))
        self._why = ""

    def _end(self, places: list[int]) -> NoReturn:
        """Receive why processes end, and raise it."""
        text = self._why.encode()[:LETTERS].ljust(LETTERS)
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        texts = [torch.empty_like(own) for _ in places]
        dist.all_gather(texts, own, group=self.group)
        if FAILED not in places:
            raise KeyboardInterrupt
        first = places.index(FAILED)
        why = bytes(texts[first].tolist()).decode(errors="replace").strip()
        raise RankFailedError(dist.get_process_group_ranks(self.group)[first], f"raised {why}")


def _rows(head: list[int], block: int) -> int:
    """Return the number of rows that a process sends, from its head."""
    return sum(head[HEAD:]) if head[0] == block else 0


def _end_of(error: BaseException, agreement: Agreement | None) -> int | None:
    """Return the exception by which an error ends a process; None if no other depends on it."""
    if agreement is None:
        return FAILED if isinstance(error, Exception) else None
    ours = isinstance(error, QuintetError) and not isinstance(error, DoesNotFitError)
    if not (agreement.ended or ours):
        return None
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
