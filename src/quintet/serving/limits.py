"""The limits of a serving engine."""

from dataclasses import dataclass

from quintet.serving.checks import check_count, check_duration

# Prompts are cut at multiples of it, whatever comes between, so that a prompt is cut alike.
GRID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a serving engine.

    Attributes:
        rows: how many texts are generated at once.
        capacity: how many tokens of prompt and answer each may have.
        queue: how many requests may wait.
        piece: how many tokens of prompts are read at once at the most.
        itl_target_ms: how many milliseconds may pass between two tokens of the others while a
            prompt is read, by pieces that are as much shorter; None for pieces as long as may be,
            each read alone.
        memory: how many bytes the rows under way may hold; None for all that they can.
        ahead: how many tokens of an answer there has to be memory for when it begins.
        patience: how many seconds someone without a row waits until another, who has several,
            gives one back.
        kept: how many bytes of what was read before are kept, to be gone on from.

    Raises:
        InputError: what is no number, or one below its least.
    """

    rows: int = 8
    capacity: int = 4096
    queue: int = 64
    piece: int = 8 * GRID
    itl_target_ms: float | None = 200.0
    memory: int | None = None
    ahead: int = 256
    patience: float = 2.0
    kept: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rows", self.rows, 1),
            ("capacity", self.capacity, 2),
            ("queue", self.queue, 0),
            ("piece", self.piece, GRID),
            ("ahead", self.ahead, 1),
            ("kept", self.kept, 0),
        ):
            check_count(name, value, least)
        if self.memory is not None:
            check_count("memory", self.memory, 1)
        if self.itl_target_ms is not None:
            check_duration("itl_target_ms", self.itl_target_ms, "milliseconds")
        check_duration("patience", self.patience, zero=True)
