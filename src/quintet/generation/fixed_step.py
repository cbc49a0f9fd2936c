"""A decode step of fixed shapes, so that it can be recorded.

At a batch of few rows a GPU computes a step faster than Python can ask for it. What is recorded
asks for nothing: it is done again, with other numbers in the same memory. Each number of rows and
of slots is a recording of its own, so there are few of either, and what they have too much is
filled up with rows that take no token.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from quintet.cache import Cache, PooledCache
from quintet.cache.fixed import FixedRows
from quintet.generation.graphs import Graphs
from quintet.layers.plain import in_between
from quintet.ops.sending import sent

# The least slots, and how much more each further number of them is.
SLOTS, TIMES = 256, 2
# Up to so many rows a recording serves twice as many as the one before; then so many more.
DOUBLED, MORE = 8, 8
PLAIN = (Tensor, nn.Parameter)


class StepProgram(Protocol):
    """Interface of the model, or program, that a step runs."""

    def __call__(
        self,
        input_ids: Tensor,
        *,
        past_key_values: Cache,
        use_cache: bool,
        logits_to_keep: int,
        return_dict: bool,
    ) -> Any:
        """Return an output with `logits` (B, 1, V)."""
        ...


@dataclass(frozen=True, slots=True)
class Recording:
    """The recorder of steps.

    Attributes:
        graphs: of the device; None to do what is recorded once for all as it is.
        compile: makes a program of a model; None to run it as it is.
    """

    graphs: Graphs | None = None
    compile: Callable[[StepProgram], StepProgram] | None = None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded step, and its inputs (3, B): ids, lengths, 1 for rows that step."""

    inputs: Tensor
    run: Callable[[], Tensor]


class FixedStep:
    """The recorded steps of one model over one pool.

    Args:
        model: what is run.
        cache: its rows, whose memory was taken.
        size: R, how many rows the pool has.
        recording: how steps are recorded.
    """

    def __init__(
        self, model: StepProgram, cache: PooledCache, size: int, recording: Recording
    ) -> None:
        self.cache, self.size = cache, size
        self._module = cast("nn.Module", model)
        self._program = model if recording.compile is None else recording.compile(model)
        self._graphs = recording.graphs
        self._device = next(self._module.parameters()).device
        self._steps: dict[tuple[int, int], _Recorded] = {}
        self._looks_like: tuple[object, ...] | None = None
        self._usable = False
        self.look()

    def look(self) -> None:
        """Drop recordings if modules, hooks or weights have changed.

        A recording reads the memory of the weights it was made with. It takes a while to look at
        all of them, so that it is done when a sequence gets its row and not at every step.
        """
        looks_like = _look(self._module)
        if looks_like != self._looks_like:
            self._steps.clear()
            self._looks_like = looks_like
            # A module with a forward of its own, as adapters make it, may be another at any time.
            own = any("forward" in vars(one) for one in self._module.modules())
            self._usable = not own and FixedRows.can_be(self.cache)

    @torch.no_grad()
    def run(self, rows: Sequence[int], tokens: Sequence[int] | Tensor) -> Tensor | None:
        """Step rows, of these pool indices, with tokens; return logits (N, V), or None.

        None if it cannot be done this way, and nothing was. Where this raises, rows have to be
        taken back to what they held.

        Args:
            rows: which ones.
            tokens: one of each; where they are a tensor (N,) on the device, nobody waits for it.
        """
        logits = self._run(rows, tokens)
        return None if logits is None else logits[sent(list(rows), torch.long, logits.device)]

    @torch.no_grad()
    def run_all(self, ids: Tensor) -> Tensor | None:
        """Step all rows with tokens (B,) on the device; return logits (B, V), or None."""
        logits = self._run(range(len(ids)), ids)
        return None if logits is None else logits[: len(ids)].clone()

    def _run(self, rows: Sequence[int], tokens: Sequence[int] | Tensor) -> Tensor | None:
        """Run a recorded step; the next one overwrites its output."""
        lengths = [self.cache.length(row) for row in self.cache.rows]
        # A row that takes no token needs a slot behind its end all the same.
        most = max(lengths) + 1
        if not self._usable or most > self.cache.capacity:
            return None
        B, S = _rows(len(lengths), self.size), _slots(most, self.cache.capacity)
        step = self._steps.get((B, S)) or self._record(B, S, lengths)
        if step is None:
            return None
        self.cache.begin_step(rows, S)
        ids, steps = [0] * len(lengths), [0] * len(lengths)
        for place, row in enumerate(rows):
            steps[row] = 1
            if not isinstance(tokens, Tensor):
                ids[row] = tokens[place]
        self._fill(step.inputs, ids, lengths, steps)
        if isinstance(tokens, Tensor):
            step.inputs[0, sent(list(rows), torch.long, tokens.device)] = tokens
        logits = step.run()
        self.cache.end_step()
        return logits

    def _record(self, B: int, S: int, lengths: list[int]) -> _Recorded | None:
        device = self._device
        inputs = torch.zeros(3, B, dtype=torch.long, device=device)
        rows = FixedRows(self.cache, inputs[1], inputs[2], S)
        run: Callable[[], Tensor] = partial(self._forward, inputs[0][:, None], rows)
        if self._graphs is not None:
            # Runs for the sake of recording change nothing: no row takes its token.
            self.cache.begin_step([], S)
            self._fill(inputs, [0] * len(lengths), lengths, [0] * len(lengths))
            try:
                run = self._graphs.capture(run)
            except RuntimeError as error:
                self._usable = False
                warnings.warn(
                    f"steps cannot be recorded on {device}, and run as they are: {error}",
                    stacklevel=2,
                )
                return None
            finally:
                self.cache.end_step()
        self._steps[B, S] = recorded = _Recorded(inputs, run)
        return recorded

    def _forward(self, ids: Tensor, rows: FixedRows) -> Tensor:
        output = self._program(
            ids, past_key_values=rows, use_cache=True, logits_to_keep=1, return_dict=True
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    @staticmethod
    def _fill(inputs: Tensor, *rows: list[int]) -> None:
        B = inputs.shape[1]
        given = [[*row, *[0] * (B - len(row))] for row in rows]
        inputs.copy_(sent(given, torch.long, inputs.device), non_blocking=True)


def _look(module: nn.Module) -> tuple[object, ...]:
    """Return everything a recording depends on, for comparison."""
    tensors = [*module.parameters(), *module.buffers()]
    # What stands for a tensor, as formats of other packages do, need not lie anywhere itself.
    places = (x.data_ptr() if type(x) in PLAIN else id(x) for x in tensors)
    return (*in_between(module), *map(id, module.modules()), *places)


def _rows(rows: int, size: int) -> int:
    """Return the number of rows to record, for this many in use."""
    recorded = 1
    while recorded < rows:
        recorded = recorded * 2 if recorded < DOUBLED else recorded + MORE
    return min(recorded, size)


def _slots(slots: int, capacity: int) -> int:
    """Return the number of slots per row to record, for this many in use."""
    recorded = SLOTS
    while recorded < slots:
        recorded *= TIMES
    return min(recorded, capacity)
