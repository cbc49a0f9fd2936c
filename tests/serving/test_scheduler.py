"""Who is next: any requests, any clock."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import InputError, QueueFullError
from quintet.serving.limits import GRID, Limits
from quintet.serving.scheduler import PASSES, Job, RowCost, Scheduler

COST = RowCost(row=0, token=1)


def run_over(scheduler: Scheduler, job: Job, tokens: int) -> None:
    """Let a job have run over tokens, and get one where that was its last."""
    job.computed += tokens
    if job.computed == job.known:
        job.known += 1
    if job.known >= job.most:
        scheduler.finish(job)


def turn(scheduler: Scheduler, now: float, seconds: float = 1.0) -> list[Job]:
    """Do what is next, and return who had a part in it."""
    plan = scheduler.plan(now)
    taking = [*plan.step]
    for job in plan.step:
        run_over(scheduler, job, 1)
    if plan.read is not None:
        batch, most = scheduler.reading(plan.read)
        taking += batch
        for job in batch:
            run_over(scheduler, job, min(most, job.known - job.computed))
    if taking:
        scheduler.account(taking, seconds)
    return taking


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 300),  # prompt
        st.integers(1, 20),  # answer
        st.sampled_from("abc"),  # scope
        st.integers(0, 2),  # priority
        st.integers(0, 30),  # arrival
    ),
    min_size=1,
    max_size=25,
)


@given(REQUESTS, st.integers(1, 5), st.sampled_from([None, 400, 800]), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_all_end_and_nobody_is_forgotten(
    asked: list[tuple[int, int, str, int, int]], rows: int, memory: int | None, patience: float
) -> None:
    limits = Limits(rows=rows, capacity=512, queue=100, memory=memory, patience=patience)
    scheduler = Scheduler(limits, COST)
    coming = [
        Job(prompt, prompt + answer, scope=scope, priority=priority, arrival=arrival)
        for prompt, answer, scope, priority, arrival in sorted(asked, key=lambda one: one[4])
    ]
    everybody = list(coming)
    now = 0.0
    while coming or len(scheduler):
        while coming and coming[0].arrival <= now:
            scheduler.submit(coming.pop(0))
        held = list(scheduler.running)
        taking = turn(scheduler, now)
        assert len(scheduler.running) <= rows
        assert len(set(scheduler.running)) == len(scheduler.running)
        assert taking or not len(scheduler) or set(held) != set(scheduler.running)
        now += 1
        assert now < 5000
    assert all(job.known == job.most for job in everybody)


def reading(*prompts: int, decoding: bool = False, **more: Any) -> tuple[list[int], int]:
    """Return whose prompts the first one is read with, by their lengths, and the most of each."""
    scheduler = Scheduler(Limits(rows=9, capacity=2048, piece=512, **more), COST)
    scheduler.pace.read(512, 0.512)
    for job in (Job(length, 2048) for length in prompts):
        scheduler.submit(job)
    plan = scheduler.plan(0.0)
    assert plan.read is not None
    if decoding:
        run_over(scheduler, scheduler.running[-1], prompts[-1])
    batch, most = scheduler.reading(plan.read)
    return [job.known for job in batch], most


def test_short_prompts_are_read_together() -> None:
    assert reading(100, 120, 90) == ([100, 120, 90], 120)
    # As many as a piece has room for, and whoever fits behind one that does not.
    assert reading(200, 200, 200, 80) == ([200, 200, 80], 200)
    # Not one that is cut, nor beside one that is, nor what few-token kernels run over.
    assert reading(100, 700, 90) == ([100, 90], 100)
    assert reading(700, 100) == ([700], 512)
    assert reading(100, 32, 33) == ([100, 33], 100)
    assert reading(32, 100) == ([32], 32)
    assert reading(100, 120, itl_target_ms=None) == ([100], 100)
    # While others wait for a token, in as many milliseconds.
    assert reading(64, 64, 64, 64, 40, decoding=True, itl_target_ms=200.0) == ([64, 64, 64], 64)


def test_a_prompt_that_has_to_pause_is_read_alone() -> None:
    scheduler = Scheduler(Limits(rows=9, capacity=2048), COST)
    for job in (Job(100, 200), Job(100, 200, stops=(70,)), Job(90, 200)):
        scheduler.submit(job)
    first, second, third = scheduler.plan(0.0).admit
    assert scheduler.reading(first) == ([first, third], 100)
    assert scheduler.reading(second) == ([second], 70)


def test_within_a_scope_who_came_first_is_served_first() -> None:
    scheduler = Scheduler(Limits(rows=1, capacity=64), COST)
    jobs = [Job(5, 8, arrival=float(n)) for n in range(4)]
    for job in jobs:
        scheduler.submit(job)
    order = []
    while len(scheduler):
        for job in turn(scheduler, 0.0):
            if job not in order:
                order.append(job)
    assert order == jobs


def test_between_scopes_who_had_least_is_served_first() -> None:
    scheduler = Scheduler(Limits(rows=1, capacity=64, patience=1e9), COST)
    many = [Job(5, 12, scope="many", arrival=0.0) for _ in range(5)]
    for job in many:
        scheduler.submit(job)
    for _ in range(3):
        turn(scheduler, 0.0)
    one = Job(5, 12, scope="one", arrival=1.0)
    scheduler.submit(one)
    ended = []
    while one in scheduler.all():
        turn(scheduler, 0.0)
        ended = [job for job in many if job.known == job.most]
    assert len(ended) == 1  # the one that had the row already


def test_who_waits_without_a_row_gets_one_of_another_with_several() -> None:
    scheduler = Scheduler(Limits(rows=2, capacity=500, patience=3.0), COST)
    rich = [Job(5, 400, scope="rich", arrival=0.0) for _ in range(3)]
    for job in rich:
        scheduler.submit(job)
    turn(scheduler, 0.0)
    assert scheduler.running == rich[:2]
    poor = Job(5, 8, scope="poor", arrival=1.0)
    scheduler.submit(poor)
    turn(scheduler, 3.0)
    assert scheduler.running == rich[:2]
    turn(scheduler, 4.0)
    turn(scheduler, 4.0)
    assert scheduler.running == [rich[0], poor]
    # The one that gave its row back keeps what it has, and is the next of its scope.
    assert rich[1].preemptions == 1
    assert rich[1].known > 5
    while poor in scheduler.all():
        turn(scheduler, 5.0)
    turn(scheduler, 5.0)
    assert scheduler.running == [rich[0], rich[1]]


def test_nobody_takes_the_last_row_while_others_wait() -> None:
    scheduler = Scheduler(Limits(rows=3, capacity=64), COST)
    for _ in range(5):
        scheduler.submit(Job(5, 60, scope="many"))
    one = Job(5, 60, scope="one")
    scheduler.submit(one)
    turn(scheduler, 0.0)
    assert one in scheduler.running
    assert len(scheduler.running) == 3


def test_memory_is_given_back_by_the_least_and_the_last() -> None:
    scheduler = Scheduler(Limits(rows=4, capacity=512, memory=100, ahead=1), COST)
    important = Job(40, 200, priority=1)
    first, last = Job(30, 200), Job(28, 200)
    for job in (first, last, important):
        scheduler.submit(job)
    plan = scheduler.plan(0.0)
    assert plan.admit == [first, last]  # the third would not fit
    scheduler.finish(first)
    scheduler.plan(0.0)
    assert scheduler.running == [last, important]
    last.known = 61
    assert scheduler.plan(0.0).preempt == [last]
    assert scheduler.running == [important]
    # One alone may have more than there is: there is nobody to give way to.
    important.known = 150
    assert scheduler.plan(0.0).preempt == []


@pytest.mark.parametrize("scopes", ["aaaaaaaaaaaaa", "bcdefghijklmn"], ids=["one", "many"])
def test_who_has_no_room_is_passed_by_some_and_not_by_all(scopes: str) -> None:
    scheduler = Scheduler(Limits(rows=4, capacity=512, memory=100, ahead=1), COST)
    runs = Job(50, 60, scope="z")
    large = Job(80, 100, scope="a")
    small = [Job(5, 8, scope=scope, arrival=1.0) for scope in scopes]
    scheduler.submit(runs)
    scheduler.plan(0.0)
    runs.computed = 49
    for job in (large, *small):
        scheduler.submit(job)
    admitted: list[Job] = []
    for now in range(20):
        for job in scheduler.plan(float(now)).admit:
            admitted.append(job)
            scheduler.finish(job)
    assert len(admitted) == PASSES
    assert large not in admitted
    scheduler.finish(runs)
    # Nobody comes between: it is its turn, and there is room.
    assert scheduler.plan(30.0).admit[0] is large


@given(st.integers(1, 2000), st.integers(GRID, 400), st.integers(0, 1999))
def test_prompts_are_cut_on_a_grid(known: int, piece: int, stop: int) -> None:
    scheduler = Scheduler(Limits(rows=1, capacity=4096, piece=piece), COST)
    job = Job(known, known + 5, stops=(stop,) if 0 < stop < known else ())
    cuts = []
    while job.computed < known:
        step = scheduler.piece(job)
        assert 1 <= step <= max(piece, GRID) + 32
        job.computed += step
        cuts.append(job.computed)
    assert cuts[-1] == known
    assert all(cut % GRID == 0 or cut == stop for cut in cuts[:-1])
    assert not job.stops or stop in cuts
    if not job.stops and len(cuts) > 1:
        assert cuts[-1] - cuts[-2] > 32


def test_no_more_wait_than_may() -> None:
    scheduler = Scheduler(Limits(rows=2, capacity=64, queue=1), COST)
    for _ in range(3):
        scheduler.submit(Job(3, 9))
    with pytest.raises(QueueFullError, match="queue=1"):
        scheduler.submit(Job(3, 9))
    turn(scheduler, 0.0)
    with pytest.raises(QueueFullError):
        scheduler.submit(Job(3, 9))


def test_who_is_late_or_has_left_is_dropped() -> None:
    scheduler = Scheduler(Limits(rows=1, capacity=64), COST)
    running, late, left = Job(3, 9), Job(3, 9, deadline=5.0), Job(3, 9)
    for job in (running, late, left):
        scheduler.submit(job)
    turn(scheduler, 0.0)
    left.cancelled = True
    assert scheduler.plan(1.0).drop == [left]
    assert scheduler.plan(4.9).drop == []
    assert scheduler.plan(5.0).drop == [late]
    assert scheduler.all() == [running]


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"piece": 8}, {"memory": 0}, {"patience": -1}])
def test_limits_that_cannot_be_are_named(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Limits(**wrong)  # type: ignore[arg-type]


def test_what_drafts_keep_counts_until_the_prompt_is_read() -> None:
    """Of those who draft alone: each token twice, and what is read of it twice more."""
    limits = Limits(rows=3, capacity=512, memory=900, ahead=10)
    scheduler = Scheduler(limits, RowCost(row=0, token=1, drafted=1, unread=2))
    first, second = (Job(100, 120, predicts=True) for _ in range(2))
    plain = Job(100, 120)
    for job in (first, second, plain):
        scheduler.submit(job)
    # 2 * (100 + 10) + 2 * 100 for each who drafts, 110 for the other.
    assert scheduler.plan(0.0).admit == [first, second]
    assert scheduler.reserved == 800
    run_over(scheduler, first, 100)
    assert scheduler.reserved == 2 * 101 + 400
    assert scheduler.plan(0.0).admit == [plain]
