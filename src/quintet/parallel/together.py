"""Runs a function on every process: all return, or all raise the same error."""

from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from quintet.errors import QuintetError, RankFailedError
from quintet.parallel.world import World


class Together:
    """A context in which processes work by themselves; where one failed, all raise at its end.

    Where all failed alike, each raises its own error; otherwise all say which one failed, and why.
    Nothing happens where there is one process.

    Attributes:
        note: what this process tells the others.
        notes: what each of them told, in their order; there once the context is left.

    Raises:
        RankFailedError: a process failed.
    """

    def __init__(self, world: World | None, doing: str) -> None:
        self.world, self.doing = world, doing
        self.note: Any = None
        self.notes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A process that is told to end ends; the others see that it is gone.
        if self.world is None or (error is not None and not isinstance(error, Exception)):
            self.notes = [self.note]
            return
        own_problem = None if error is None else _in_words(error)
        reports: list[Any] = [None] * self.world.degrees.size
        dist.all_gather_object(reports, (own_problem, self.note))
        problems = [problem for problem, _ in reports]
        self.notes = [note for _, note in reports]
        if own_problem is not None and problems == [own_problem] * len(problems):
            return
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise RankFailedError(rank, f"failed {self.doing}: {problem}") from error


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, QuintetError) else f"{type(error).__name__}: {error}"
