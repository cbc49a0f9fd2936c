"""Ten thousand ways in which requests come, leave, end and fail: nothing is lost or owned twice."""

import random
from dataclasses import dataclass, field
from typing import Any

from quintet.cache import RowContent
from quintet.serving.answers import Answer
from quintet.serving.limits import Limits
from quintet.serving.request import Request, hand_out
from quintet.serving.runner import Runner
from quintet.serving.scheduler import RowCost
from quintet.serving.transcript import Transcript

INTERLEAVINGS = 10_000


@dataclass(eq=False)
class Text:
    """A sequence whose tokens are numbers that follow each other."""

    ids: list[int]
    room: int
    prompt_length: int = 0
    computed: int = 0
    error: Exception | None = None
    finish_reason: str | None = None
    observed: None = None
    watched: None = None
    drafting: None = None
    adapter_name: None = None
    only_reads: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Steps:
    """An engine without a model, whose rows hold the numbers themselves."""

    rows: int
    dice: random.Random
    recurrent: bool = False
    held: dict[Text, list[int]] = field(default_factory=dict)
    drafted: int = 0
    exchanges: bool = False

    @property
    def sequences(self) -> list[Text]:
        return list(self.held)

    def add(self, text: Text, *contents: RowContent) -> None:
        assert text not in self.held
        assert len(self.held) < self.rows
        assert not contents or contents[-1].resumable
        self.held[text] = [int(x) for one in contents for x in one.states[0]]  # type: ignore[index]
        text.computed = len(self.held[text])
        assert self.held[text] == text.ids[: text.computed]

    def can_adapt(self, text: Text) -> bool:
        return True

    def length(self, text: Text) -> int:
        return len(self.held[text])

    def remove(self, text: Text) -> None:
        del self.held[text]

    def extract(self, text: Text, start: int, stop: int) -> Any:
        whole = not self.recurrent or stop == len(self.held[text])
        return Content(start, self.held[text][start:stop], whole, self.recurrent)

    def step(self, texts: list[Text], piece: int | None) -> list[list[int]]:
        if self.dice.random() < 0.02:
            raise self.dice.choice((MemoryError, RuntimeError))("for once")
        made = []
        for text in texts:
            before = len(text.ids)
            stop = before if piece is None else min(text.computed + piece, before)
            self.held[text] += text.ids[text.computed : stop]
            text.computed = stop
            if stop == before:
                if self.dice.random() < 0.01:
                    text.error, text.finish_reason = ValueError("its own"), "error"
                else:
                    text.ids.append(text.ids[-1] + 1)
                    if len(text.ids) - text.prompt_length == text.max_new_tokens:
                        text.finish_reason = "length"
            made.append(text.ids[before:])
        return made


@dataclass
class Content:
    start: int
    numbers: list[int]
    resumable: bool
    recurrent: bool

    @property
    def states(self) -> tuple[list[int]]:
        return (self.numbers,)

    @property
    def nbytes(self) -> int:
        return len(self.numbers) + 5 * (self.recurrent and self.resumable)

    def split(self, at: int) -> "tuple[Content, Content]":
        n = at - self.start
        head = Content(self.start, self.numbers[:n], not self.recurrent, self.recurrent)
        return head, Content(at, self.numbers[n:], self.resumable, self.recurrent)

    def without_states(self) -> "Content":
        return Content(self.start, self.numbers, not self.recurrent, self.recurrent)


def test_any_interleaving() -> None:
    dice, clock, done = random.Random(11), [0.0], 0
    while done < INTERLEAVINGS:
        rows = dice.randint(1, 4)
        steps = Steps(rows, dice, recurrent=dice.random() < 0.4)
        limits = Limits(
            rows=rows,
            capacity=1000,
            queue=dice.choice((2, 50)),
            memory=dice.choice((None, 400, 1500)),
            patience=dice.choice((0.0, 3.0)),
            kept=dice.choice((0, 200, 2000)),
        )
        runner = Runner(steps, limits, lambda: clock[0], RowCost(5 * steps.recurrent, 1))  # type: ignore[arg-type]
        told: dict[Request, list[Answer | Exception]] = {}
        going: list[Request] = []
        for _ in range(dice.randint(5, 60)):
            done += 1
            what = dice.random()
            if what < 0.35:
                # Few beginnings, so that they are met again.
                first = dice.randrange(3) * 1000
                text: Any = Text([first + n for n in range(dice.choice((1, 3, 70, 200)))], 0)
                text.max_new_tokens = dice.randint(1, 12)
                request = Request(
                    text,
                    lambda one: None,
                    hand_out,
                    Transcript(None),
                    scope=dice.choice("ab"),
                    priority=dice.randint(0, 1),
                    deadline=clock[0] + dice.choice((2, 40)) if dice.random() < 0.2 else None,
                    arrival=clock[0],
                    stable=tuple({n for n in (1, 64, 70) if n < len(text.ids)}),
                )
                told[request] = []
                request.reader = told[request].append
                going.append(request)
                runner.submit(request)
            elif what < 0.5 and going:
                runner.cancel(dice.choice(going))
            else:
                runner.turn()
                clock[0] += dice.random()
                assert len(steps.held) == len(runner.scheduler.running) <= rows
        for _ in range(3000):
            if not runner.turn() or runner.stopped is not None:
                break
            clock[0] += 1
        # All rows are free, and everybody was told all there was, once.
        runner.turn()
        assert not steps.held
        assert not runner.scheduler.all()
        assert not runner.state.lost
        assert runner.prefix.nbytes <= limits.kept
        for request, news in told.items():
            ends = [one for one in news if not isinstance(one, Answer) or one.finish_reason]
            assert len(ends) == 1 or (request.cancelled and not ends)
            assert not ends or news[-1] is ends[0]
            made = [token for one in news if isinstance(one, Answer) for token in one.ids]
            after = request.text.ids[request.text.prompt_length - 1]
            assert made == list(range(after + 1, after + 1 + len(made)))
            if ends and isinstance(ends[0], Answer):
                assert len(made) == request.text.max_new_tokens


def test_a_row_that_nobody_has_is_free_when_the_engine_is_idle() -> None:
    steps = Steps(2, random.Random(1))
    runner = Runner(steps, Limits(rows=2, capacity=10), float, RowCost(0, 1))  # type: ignore[arg-type]
    steps.add(Text([1, 2], 3))
    runner.turn()
    assert not steps.held
    assert runner.state.lost == 1
    runner.turn()
    assert runner.state.lost == 1
