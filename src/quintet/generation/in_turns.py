"""Pipelined decoding: groups of rows pass a model's stages one behind the other.

With all rows in one group a stage waits, token by token, until the others have run. With as many
groups as stages each runs one while the next has another. What a group's tokens are is told to the
stages without waiting for them: they read it when the group's turn comes again.

A row gets what it gets in one process: what is drawn for it comes from a generator of its own, or
in the order of rows from torch's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from quintet.generation.decode import Generation, add, added
from quintet.generation.outputs import ForwardOutput
from quintet.generation.prompt import Prompt
from quintet.generation.sampler import RowGenerators
from quintet.parallel.agree import Agreement
from quintet.parallel.world import World

# Fewer tokens at once take about as long, and more pieces than these a stage wait little less.
FEW, PIECES = 256, 4


def groups_of(world: World | None, rows: int) -> list[slice]:
    """Return the groups of rows: as many as stages, at most one per row."""
    count = 1 if world is None else min(world.degrees.pp, rows)
    ends = [rows * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def pieces_of(world: World | None, rows: int, width: int) -> int | None:
    """Return the prefill chunk size under pipeline parallelism, or None.

    Args:
        world: the processes.
        rows: how many prompts there are.
        width: how long they are.
    """
    count = 1 if world is None else world.degrees.pp
    piece = max(-(-FEW // rows), -(-width // (PIECES * count)))
    return piece if count > 1 and piece < width else None


def in_groups(
    prompt: Prompt, generators: RowGenerators, groups: Sequence[slice], copies: int
) -> Iterator[tuple[Prompt, RowGenerators]]:
    """Yield each group's prompts, and the generators of their copies."""
    for group in groups:
        own = slice(group.start * copies, group.stop * copies)
        yield prompt.rows(group), generators and generators[own]


def decode_in_turns(begins: Sequence[Callable[[], Generation]], agreement: Agreement) -> Tensor:
    """Generate until all rows have ended or reached their limit; return all ids.

    Args:
        begins: runs over the prompts of a group, and returns what goes on with them.
        agreement: of the processes, of which the first has the last stage and chooses.
    """
    groups = [_Group(begin) for begin in begins]
    with agreement.ahead():
        (_choose if agreement.decides else _follow)(groups, agreement)
    runs = [group.run for group in groups]
    width = max(len(run.text) for run in runs)
    for run in runs:
        # A group that has ended waits for no other.
        for _ in range(width - len(run.text)):
            run.text.append(run.pad)
    return torch.cat([run.text.ids for run in runs])


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that pass the stages together.

    Attributes:
        unfinished: (B,) which of them go on; None for all.
        over: whether none does.
    """

    begin: Callable[[], Generation]
    unfinished: Tensor | None = None
    over: bool = False
    _run: Generation | None = field(default=None, init=False)

    @property
    def run(self) -> Generation:
        """The generation of this group, after prefill."""
        assert self._run is not None, "the prompts come first"
        return self._run

    def forward(self) -> ForwardOutput:
        """Run the prompts, or the last tokens."""
        if self._run is None:
            self._run = self.begin()
            return self._run.output
        return self._run.forward.step(self._run.text, self.unfinished)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """Append a token to every row, and return the message for the others."""
        return added(self.run, self._take(add(self.run, logits, self.unfinished, step)))

    def receive(self, message: Tensor) -> None:
        """Append the tokens that another process chose."""
        tokens, going = message
        self.run.text.append(tokens)
        self._take(None if bool(going.all()) else going.bool())

    def _take(self, unfinished: Tensor | None) -> Tensor | None:
        self.unfinished = unfinished
        self.over = unfinished is not None and not bool(unfinished.any())
        return unfinished

    def skip(self) -> None:
        """Draw numbers for ended rows, to keep the generators in step."""
        sampler, ids = self.run.sampler, self.run.text.ids
        if sampler.do_sample and sampler.generators is None:
            sampler.uniform(len(ids), 1, ids.device)


def _choose(groups: list[_Group], agreement: Agreement) -> None:
    step, max_new_tokens = 1, 1
    while step <= max_new_tokens and not all(group.over for group in groups):
        for place, group in enumerate(groups):
            if group.over:
                group.skip()
                continue
            logits, number = group.forward().logits[:, -1], step
            max_new_tokens = group.run.limits.most

            def choose(group: _Group = group, logits: Tensor = logits, step: int = step) -> Tensor:
                return group.choose(logits, step)

            try:
                agreement.decided(choose)
            except BaseException:
                # The others have begun with these, and end when they ask for this group's tokens.
                waiting = groups[:place] if number < max_new_tokens else []
                for other in groups[place + 1 :] + waiting:
                    if not other.over:
                        other.forward()
                raise
        step += 1


def _follow(groups: list[_Group], agreement: Agreement) -> None:
    def nothing() -> Tensor:
        raise AssertionError("another process chooses")

    step, max_new_tokens = 0, 1
    while step <= max_new_tokens and not all(group.over for group in groups):
        for group in groups:
            if step and not group.over:
                group.receive(agreement.decided(nothing, group.run.text.ids.device))
            if not group.over and step < max_new_tokens:
                group.forward()
                max_new_tokens = group.run.limits.most
        step += 1
